"""Weights of PyTorch's networks, torchvision's and timm's: read, and written."""

import functools
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resflax.errors import UserError
from resflax.interop import alexnet, densenet, inception, resnet, state_dict, vgg, weights
from resflax.interop.layout import RATES, Family, Layout
from resflax.interop.weights import Variables
from resflax.models import create_model
from resflax.models.alexnet import AlexNet
from resflax.models.densenet import DenseNet
from resflax.models.googlenet import GoogLeNet
from resflax.models.inception_resnet import InceptionResNet
from resflax.models.inception_v3 import InceptionV3
from resflax.models.inception_v4 import InceptionV4
from resflax.models.resnet import ResNet
from resflax.models.vgg import VGG

FAMILIES: dict[type[nn.Module], Family] = {
    ResNet: resnet.FAMILY,
    DenseNet: densenet.FAMILY,
    VGG: vgg.FAMILY,
    AlexNet: alexnet.FAMILY,
    GoogLeNet: inception.GOOGLENET,
    InceptionV3: inception.INCEPTION_V3,
    InceptionV4: inception.INCEPTION_V4,
    InceptionResNet: inception.INCEPTION_RESNET_V2,
}

# Batch norm's count of training steps, which nothing reads while its momentum is a number.
_COUNTER = "num_batches_tracked"


def from_torch(
    name: str,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    num_classes: int | None = None,
    *,
    allow_pickle: bool = False,
    **overrides: Any,
) -> tuple[nn.Module, Variables]:
    """A network with the weights of torchvision's or timm's, whose logits are theirs.

    The layout is seen from the names of the arrays: torchvision's and timm's (the same for ResNets,
    DenseNets and Inception v3), or that of timm's senet.py ('legacy_se...') or resnetv2.py. What
    the library's network does otherwise than ours, such as a pool's padding, becomes an argument of
    the network; arguments given here win. The weights do not show everything, so that these are
    taken from the layout: the stem's pool, the stride's place in a bottleneck (senet.py: the 1x1
    convolution where nothing is grouped), epsilons, what average pools count, where the first
    activation stands. The network has its own rates of dropout, not the library's.

    Images are NHWC here, normalised as the library does before its network; torchvision's
    pretrained GoogLeNet and Inception v3 change that once more inside (`transform_input`), which
    this network does not. Running variances are as the library has them. In training it feeds them
    the unbiased variance of a batch, sum / (n - 1) over its n pixels, where ours is sum / n.

    Args:
      name: one of `resflax.list_models()`: "resnet50", "preact_resnet50" (timm's resnetv2_50).
      path_or_state_dict: a .safetensors file; a .pth, .pt, .bin, .ckpt or .tar file, if
        `allow_pickle`; or arrays of PyTorch or NumPy by name, which are copied. Of a checkpoint of
        training the weights are taken: see `resflax.interop.state_dict.arrays`.
      num_classes: units of the classifier; None: as many as in the weights. Weights without a
        classifier (of self-supervised training, or timm's num_classes=0) need it, and get one as
        at the start of a training, always the same.
      allow_pickle: whether files in Python's pickle format are read: by torch 2.6 or later, with
        `weights_only`. Nothing else makes them safe.
      **overrides: arguments of the network, as for `resflax.create_model`: `depth=26`, `dtype=...`.

    Returns:
      The network, and its variables, float32: 'params' and, with batch norm, 'batch_stats'.

    Raises:
      UserError: if the file cannot be read or is a pickle that is not allowed, the layout is not
        known, the arrays are not those of the network (missing, too many or of other shapes), or an
        argument makes a network of which the library has none, such as a part from outside.
    """
    model, variables, head = read(
        name, path_or_state_dict, num_classes, allow_pickle=allow_pickle, **overrides
    )
    return model, weights.with_head(variables, head, num_classes, path_or_state_dict)


def read(
    name: str,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    num_classes: int | None = None,
    *,
    allow_pickle: bool = False,
    **overrides: Any,
) -> tuple[nn.Module, Variables, Variables]:
    """As `from_torch`, but a classifier that the weights lack is not made.

    Returns:
      The network, its variables, and the shapes of the classifier's parameters.
    """
    probe = create_model(name, num_classes, **overrides)
    arrays = state_dict.arrays(path_or_state_dict, allow_pickle=allow_pickle)
    layout = _recognised(name, probe, arrays)
    arrays = {k: v for k, v in layout.current(arrays).items() if not k.endswith(_COUNTER)}
    shapes = {key: array.shape for key, array in arrays.items()}
    if num_classes is None:
        head = layout.kernel_key(probe, "head")
        num_classes = shapes[head][0] if head in shapes else None
    model = create_model(name, num_classes, **(layout.conventions(probe, shapes) | overrides))
    stems = (layout.kernel_key(model, stem) for stem in _family(model).stems)
    channels = next((shapes[key][1] for key in stems if key in shapes), 3)
    template = _template(model, channels)
    variables = weights.read(layout.entries(model, template), arrays, template)
    _check_known(name, model, layout)
    return model, variables, template["params"]["head"]


def to_torch(model: nn.Module, variables: Variables, library: str | None = None) -> dict[str, Any]:
    """The inverse of `from_torch`: what `load_state_dict` of the library's network takes.

    Args:
      model: the network.
      variables: its 'params' and 'batch_stats'.
      library: 'torchvision', 'timm', 'timm_legacy' (senet.py) or 'timm_v2' (resnetv2.py); None: the
        first of them that has a network with the same logits.

    Returns:
      Tensors of torch, in the CPU's memory, by name. Batch norms' counts of steps are 0.

    Raises:
      UserError: if no network of the library computes the same, or the variables are not the
        network's, or torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "to_torch gives tensors of torch, which is not installed: pip install 'resflax[torch]'."
        ) from error
    family = _family(model)
    template = _template(model, _channels(family, variables))
    weights.check_shapes("the variables", _shapes(template), _shapes(variables))
    layout = _counterpart(family, model, template, library)
    arrays = weights.write(layout.entries(model, template), variables)
    state = {key: torch.from_numpy(array) for key, array in arrays.items()}
    for key in arrays:
        if key.endswith(".running_mean"):
            counter = f"{key.removesuffix('running_mean')}{_COUNTER}"
            state[counter] = torch.zeros((), dtype=torch.int64)
    return state


def _family(model: nn.Module) -> Family:
    if type(model) not in FAMILIES:
        known = ", ".join(cls.__name__ for cls in FAMILIES)
        raise UserError(f"{type(model).__name__} has no weights of PyTorch's; these have: {known}.")
    return FAMILIES[type(model)]


def _recognised(name: str, model: nn.Module, arrays: Mapping[str, Any]) -> Layout:
    family = _family(model)
    for layout in family.layouts:
        if layout.mark in layout.current(arrays):
            return layout
    marks = ", ".join(f"{layout.mark!r} ({layout.library})" for layout in family.layouts)
    found = ", ".join(map(repr, list(arrays)[:3])) or "nothing"
    raise UserError(
        f"the weights are of no layout known for {name}: they have {found}, ..., "
        f"but none of {marks}."
    )


def _check_known(name: str, model: nn.Module, layout: Layout) -> None:
    """Raises UserError if no network with such weights computes what `model` does."""
    alike = [one for one in _family(model).layouts if one.mark == layout.mark]
    unknown = min((one.unknown(model, RATES) for one in alike), key=len)
    if unknown:
        raise UserError(f"the weights are of no {name} with these arguments: {', '.join(unknown)}.")


def _counterpart(
    family: Family, model: nn.Module, template: Variables, library: str | None
) -> Layout:
    """The layout of a library whose network computes what `model` does."""
    known = list(dict.fromkeys(layout.library for layout in family.layouts))
    if library not in (None, *known):
        raise UserError(
            f"library {library!r} is not one of {', '.join(map(repr, known))}, in which "
            f"{type(model).__name__} is known."
        )
    refusals = []
    for layout in family.layouts:
        if library in (None, layout.library):
            differences = layout.unknown(model)
            if not differences:
                shapes = weights.shapes(layout.entries(model, template), template)
                differences = layout.differences(model, shapes)
            if not differences:
                return layout
            refusals.append(f"{layout.library}: {', '.join(differences)}")
    raise UserError(f"there is no network with these logits in {'; in '.join(refusals)}.")


def _template(model: nn.Module, channels: int) -> Variables:
    """The shapes of the network's variables; nothing is allocated."""
    side = 32 if getattr(model, "stem", None) == "cifar" else _family(model).image_size
    images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)


def _channels(family: Family, variables: Variables) -> int:
    """Of the images that the stem was made for."""
    leaves = weights.flatten(variables)
    stems = (("params", *stem.split("/"), "kernel") for stem in family.stems)
    return next((leaves[path].shape[2] for path in stems if path in leaves), 3)


def _shapes(variables: Variables) -> dict[str, tuple[int, ...]]:
    return {"/".join(path): leaf.shape for path, leaf in weights.flatten(variables).items()}
