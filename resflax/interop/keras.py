"""Weights of keras.applications: ResNet, ResNetV2, DenseNet, InceptionV3, InceptionResNetV2.

Two kinds of HDF5 file are read: the legacy `.h5`, of weights alone (these are the files that
keras.applications downloads) or of a whole model, and the `.weights.h5` of Keras 3. Keras itself is
not needed, h5py is.

Keras ends its networks in a softmax; ours give the logits before it. Images are prepared as Keras
does for the network at hand: `keras.applications.<module>.preprocess_input`.
"""

import dataclasses
import functools
import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resflax.errors import UserError
from resflax.interop import weights
from resflax.interop.layout import NEUTRAL, RATES
from resflax.interop.weights import Entry, Path, Variables
from resflax.models import repeat, zoo
from resflax.models.constructors import title

# Of its files; the last is an archive that has an HDF5 file in it.
SUFFIXES = (".h5", ".hdf5", ".keras")

# The arrays of the layers of a file, by the layers' names.
Arrays = dict[str, list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of Keras that has weights, and the module of ours that is the same.

    Attributes:
      module: its path in our variables, without the collection.
      kind: a key of KINDS.
      name: in Keras; None: a name that Keras counts up, such as conv2d_12.
      order: layouts are in the order of the layers' creation, by which Keras counts names up;
        sorted by this, they are in the order of `keras.Model.layers`.
    """

    module: Path
    kind: str
    name: str | None = None
    order: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """What Keras calls the layers of a family, and what its networks do differently.

    Attributes:
      layers: from the network and the paths of its modules, to the layers but for the classifier.
        It may give layers that the network has not.
      overrides: of the network, which make it Keras'.
    """

    layers: Callable[[Any, Collection[Path]], Iterator[Layer]]
    overrides: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class File:
    """The weights of a file.

    Attributes:
      layers: the arrays of every layer that has any.
      named: whether the layers have the names that they have in the network. Before Keras 3.6 a
        `.weights.h5` has not: conv2d_12 is the 13th convolution of `keras.Model.layers` there.
    """

    layers: Arrays
    named: bool


# Our names of the weights of a kind of layer, in Keras' order, and Keras' own.
KINDS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "conv2d": (("params", "kernel", "kernel"), ("params", "bias", "bias")),
    "dense": (("params", "kernel", "kernel"), ("params", "bias", "bias")),
    "batch_normalization": (
        ("params", "scale", "gamma"),
        ("params", "bias", "beta"),
        ("batch_stats", "mean", "moving_mean"),
        ("batch_stats", "var", "moving_variance"),
    ),
}

HEAD = Layer(("head",), "dense")

# Modules of a block and what Keras calls them after the block's name, in the order of its layers.
_BLOCK_V1 = {
    "conv1": "1_conv",
    "norm1": "1_bn",
    "conv2": "2_conv",
    "norm2": "2_bn",
    "shortcut/conv": "0_conv",
    "conv3": "3_conv",
    "shortcut/norm": "0_bn",
    "norm3": "3_bn",
}
_BLOCK_V2 = {
    "norm1": "preact_bn",
    "conv1": "1_conv",
    "norm2": "1_bn",
    "conv2": "2_conv",
    "norm3": "2_bn",
    "shortcut/conv": "0_conv",
    "conv3": "3_conv",
}
_DENSE_LAYER = {"norm1": "0_bn", "conv1": "1_conv", "norm2": "1_bn", "conv2": "2_conv"}
_TRANSITION = {"norm": "bn", "conv": "conv"}
_STEM = {"conv": "conv", "norm": "bn"}

# The layers of InceptionResNetV2 whose names are not counted.
_INCEPTION_RESNET = {
    "conv_7b/conv1": "conv_7b",
    **{
        f"block_{ours}{i}/up": f"{theirs}_{i}_conv"
        for ours, theirs, size in (("a", "block35", 10), ("b", "block17", 20), ("c", "block8", 10))
        for i in range(1, size + 1)
    },
}


def _named(module: str, prefix: str, table: Mapping[str, str]) -> Iterator[Layer]:
    """The layers of a module of ours, whose names begin with `prefix` in Keras."""
    for ours, theirs in table.items():
        kind = "batch_normalization" if theirs.endswith("bn") else "conv2d"
        yield Layer((*module.split("/"), *ours.split("/")), kind, f"{prefix}_{theirs}")


def _resnet_layers(
    model: Any, modules: Collection[Path], *, block: Mapping[str, str]
) -> Iterator[Layer]:
    yield from _named("stem", "conv1", _STEM)
    for stage, size in enumerate(model.stage_sizes, start=2):
        for i in range(1, size + 1):
            yield from _named(f"stage{stage}_block{i}", f"conv{stage}_block{i}", block)
    yield Layer(("norm",), "batch_normalization", "post_bn")


def _densenet_layers(model: Any, modules: Collection[Path]) -> Iterator[Layer]:
    yield from _named("stem", "conv1", _STEM)
    for block, size in enumerate(model.stage_sizes, start=1):
        for i in range(1, size + 1):
            yield from _named(f"block{block}_layer{i}", f"conv{block + 1}_block{i}", _DENSE_LAYER)
        yield from _named(f"transition{block}", f"pool{block + 1}", _TRANSITION)
    yield Layer(("norm",), "batch_normalization", "bn")


def _inception_layers(
    model: Any, modules: Collection[Path], *, names: Mapping[str, str]
) -> Iterator[Layer]:
    """Convolutions with norms, branch by branch; Keras counts their names but for `names`."""
    for number, part in enumerate(model.parts()):
        inside = sorted({path[1] for path in modules if path[0] == part})
        lasts = dict(name.rsplit("conv", 1) for name in inside if "conv" in name)
        for module in inside:
            name = names.get(f"{part}/{module}")
            if module == "up":  # joins the branches of a residual block, and has no norm
                yield Layer((part, module), "conv2d", name, (number, 1))
                continue
            branch, conv = module.rsplit("conv", 1)
            # Layers of a model are in the order of their distance from its end, the branch as it
            # was built where that is the same; two that are concatenated once more are before one.
            after = int(lasts[branch].strip("ab")) - int(conv.strip("ab"))
            order = (number, 0, -after, not conv.endswith(("a", "b")))
            yield Layer((part, module, "conv"), "conv2d", name, order)
            norm = name and f"{name}_bn"
            yield Layer((part, module, "norm"), "batch_normalization", norm, order)


_V1 = Layout(
    functools.partial(_resnet_layers, block=_BLOCK_V1),
    {"stride_in": "1x1", "conv_bias": "all", "bn_epsilon": 1.001e-5},
)
_V2 = Layout(
    functools.partial(_resnet_layers, block=_BLOCK_V2),
    {
        "first_act": "block",
        "downsample": "last",
        "stem_pool": "zeros",
        "conv_bias": "unnormed",
        "bn_epsilon": 1.001e-5,
    },
)
_DENSENET = Layout(_densenet_layers, {"bn_epsilon": 1.001e-5})

LAYOUTS: dict[str, Layout] = {
    **{f"resnet{depth}": _V1 for depth in (50, 101, 152)},
    **{f"preact_resnet{depth}": _V2 for depth in (50, 101, 152)},
    **{f"densenet{depth}": _DENSENET for depth in (121, 169, 201)},
    "inception_v3": Layout(
        functools.partial(_inception_layers, names={}),
        {"norm_scale": False, "count_padding": False},
    ),
    "inception_resnet_v2": Layout(
        functools.partial(_inception_layers, names=_INCEPTION_RESNET), {"norm_scale": False}
    ),
}


def from_keras(
    name: str, path: str | os.PathLike[str], num_classes: int | None = None, **overrides: Any
) -> tuple[nn.Module, Variables]:
    """A network with the weights of a file of keras.applications.

    Args:
      name: of ours, a key of LAYOUTS: resnet50, 101 and 152 are Keras' ResNet50, ...,
        preact_resnet50, ... its ResNet50V2, ..., densenet121, 169, 201, inception_v3 and
        inception_resnet_v2.
      path: of the HDF5 file: see the head of this module.
      num_classes: units of the classifier; None: the file's. A file without a classifier
        (include_top=False) needs it, and gets one as at the start of a training, always the same.
      **overrides: of the network, beyond what makes it Keras'; see `create_model`.

    Returns:
      The network, whose logits are those of Keras, and its variables.

    Raises:
      UserError: if there is no layout for the name, the file is not one of Keras' HDF5 files, or
        its weights do not fit the network, or an argument makes a network that Keras has not.
      OSError: if there is no such file.
    """
    model, variables, head = read(name, path, num_classes, **overrides)
    return model, weights.with_head(variables, head, num_classes, path)


def read(
    name: str, path: str | os.PathLike[str], num_classes: int | None = None, **overrides: Any
) -> tuple[nn.Module, Variables, Variables]:
    """As `from_keras`, but a classifier that the file lacks is not made.

    Returns:
      The network, its variables, and the shapes of the classifier's parameters.
    """
    if name not in LAYOUTS:
        raise UserError(f"Keras has no network {name!r} that is read; {', '.join(LAYOUTS)} are.")
    layout = LAYOUTS[name]
    file = _open(path)
    classes = {array.shape[-1] for array, *_ in file.layers.values() if array.ndim == 2}
    if num_classes is None and classes:
        num_classes = max(classes)
    model = zoo.create_model(name, num_classes, **{**layout.overrides, **overrides})
    _check_known(name, model, layout)
    # Layouts know blocks by their names, so loops are packed afterwards.
    loops = getattr(model, "loops", ())
    template = _template(model.clone(packed=False) if loops else model, zoo.image_size(name))
    entries = _entries(layout, model, template, file)
    variables = weights.read(entries, _arrays(file), template)
    return model, repeat.pack(variables, loops), template["params"]["head"]


def _check_known(network: str, model: nn.Module, layout: Layout) -> None:
    """Raises UserError if the network is not Keras', but for conventions that were overridden."""
    usual = zoo.create_model(network, **layout.overrides)
    unknown = []
    for field in dataclasses.fields(model):
        name, value, there = field.name, getattr(model, field.name), getattr(usual, field.name)
        convention = name in (*layout.overrides, "bn_epsilon") and not callable(value)
        if value != there and not convention and name not in {*NEUTRAL, *RATES, "parent", "name"}:
            unknown.append(f"{name} {title(value)} is {there!r} there")
    if unknown:
        raise UserError(f"Keras has no {network} with these arguments: {', '.join(unknown)}.")


def _template(model: nn.Module, image_size: int) -> Variables:
    """Shapes and types of the parameters and running statistics."""
    images = jnp.zeros((1, image_size, image_size, 3))
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    return {collection: shapes[collection] for collection in ("params", "batch_stats")}


def _entries(layout: Layout, model: Any, template: Variables, file: File) -> list[Entry]:
    """One for every array of the network that the layout knows."""
    leaves = weights.flatten(template)
    modules = {path[1:-1] for path in leaves}
    found = [layer for layer in (*layout.layers(model, modules), HEAD) if layer.module in modules]
    return [
        Entry((collection, *layer.module, ours), f"{name}/{theirs}")
        for layer, name in _file_names(found, file)
        for collection, ours, theirs in KINDS[layer.kind]
        if (collection, *layer.module, ours) in leaves
    ]


def _file_names(found: Sequence[Layer], file: File) -> Iterator[tuple[Layer, str]]:
    """The layers, each with its name in the file: counted names start anywhere, so by order."""
    if not file.named:
        found = [dataclasses.replace(x, name=None) for x in sorted(found, key=lambda x: x.order)]
    own = {layer.name for layer in found}
    counted = {
        kind: iter(
            sorted(
                (n for n in file.layers if n not in own and _kind(file.layers[n]) == kind),
                key=_number,
            )
        )
        for kind in KINDS
    }
    for layer in found:
        name = layer.name or next(counted[layer.kind], None)
        # Without a name, the file lacks it: an error will say so.
        yield layer, name or f"{layer.kind} of {'/'.join(layer.module)}"


def _number(name: str) -> int:
    """The number at the end of a name that Keras counts up: conv2d, conv2d_1, conv2d_2, ..."""
    number = re.search(r"_(\d+)$", name)
    return int(number[1]) if number else 0


def _kind(arrays: list[np.ndarray]) -> str | None:
    """The kind of a layer; some files give it names that do not tell."""
    return {4: "conv2d", 2: "dense", 1: "batch_normalization"}.get(arrays[0].ndim)


def _arrays(file: File) -> dict[str, np.ndarray]:
    """The arrays by their layer's name and their own: 'conv1_bn/gamma'."""
    arrays = {}
    for layer, values in file.layers.items():
        names = [theirs for *_, theirs in KINDS[_kind(values) or "dense"]]
        # A batch norm without a scale begins with beta.
        names = names[-len(values) :] if values[0].ndim == 1 else names
        for i, value in enumerate(values):
            arrays[f"{layer}/{names[i] if i < len(names) else i}"] = value
    return arrays


def _open(path: str | os.PathLike[str]) -> File:
    """Reads a file of either kind.

    Raises:
      UserError: if it is not HDF5, or not of Keras.
      OSError: if there is no such file.
    """
    os.stat(path)
    try:
        import h5py
    except ImportError as error:  # of an extra: nothing else needs it
        where = os.fspath(path)
        raise UserError(f"{where} is read by h5py: pip install 'resflax[keras]'.") from error
    if not h5py.is_hdf5(path):
        archive = "; unpack the model.weights.h5 in it" if zipfile.is_zipfile(path) else ""
        raise UserError(f"{os.fspath(path)} is not an HDF5 file{archive}.")
    with h5py.File(path, "r") as file:
        legacy = file.get("model_weights", file)
        if names := _attribute(legacy, "layer_names"):
            # DenseNet's first layers were called conv1/conv and conv1/bn.
            groups = {name.replace("/", "_"): legacy[name] for name in names}
            return File(_with_weights(groups, _legacy_arrays), True)
        for root in ("layers", "_layer_checkpoint_dependencies"):  # the latter: TensorFlow 2.13
            if root in file:
                groups = {k: v["vars"] for k, v in file[root].items() if "vars" in v}
                named = {str(v.attrs["name"]): v for v in groups.values() if "name" in v.attrs}
                return File(_with_weights(named or groups, _current_arrays), bool(named))
    raise UserError(
        f"{os.fspath(path)} is an HDF5 file, but not of Keras: it has neither layer_names nor "
        "layers."
    )


def _with_weights(groups: Mapping[str, Any], read: Callable[[Any], list[np.ndarray]]) -> Arrays:
    """The arrays of the groups that have any."""
    arrays = {name: read(group) for name, group in groups.items()}
    return {name: values for name, values in arrays.items() if values}


def _legacy_arrays(group: Any) -> list[np.ndarray]:
    return [np.asarray(group[name]) for name in _attribute(group, "weight_names")]


def _current_arrays(group: Any) -> list[np.ndarray]:
    return [np.asarray(group[str(i)]) for i in range(len(group))]


def _attribute(group: Any, name: str) -> list[str]:
    """A list of names, which Keras splits into name0, name1, ... where it is too long for HDF5."""
    chunks = [group.attrs[name]] if name in group.attrs else []
    while f"{name}{len(chunks)}" in group.attrs:
        chunks.append(group.attrs[f"{name}{len(chunks)}"])
    return [x.decode() if isinstance(x, bytes) else str(x) for chunk in chunks for x in chunk]
