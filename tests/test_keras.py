import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile

import jax
import numpy as np
import optax
import plain
import pytest

import resflax
from benchmarks import keras_parity
from resflax import config as config_lib
from resflax import transfer
from resflax.interop import keras as interop
from resflax.train_state import create_train_state

h5py = pytest.importorskip("h5py")

needs_keras = pytest.mark.skipif(not importlib.util.find_spec("keras"), reason="needs Keras")

QUICK = ("preact_resnet50",)
NAMES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in interop.LAYOUTS
]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of write_reference for a network; Keras is imported in a process of its own."""
    folders = {}

    def folder(name):
        if name not in folders:
            path = tmp_path_factory.mktemp(name)
            call = f"write_reference({name!r}, {keras_parity.image_sizes(name)}, {str(path)!r})"
            subprocess.run(
                [sys.executable, "-c", f"from benchmarks.keras_parity import *; {call}"],
                env={**os.environ, "KERAS_BACKEND": "jax"},
                check=True,
            )
            folders[name] = path
        return folders[name]

    return folder


def difference(folder, size, model, variables):
    with np.load(folder / "reference.npz") as arrays:
        return keras_parity.difference(model, variables, arrays, size)


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def write_legacy(path, layers, root="/", chunks=1):
    """A legacy file of {layer: [(weight, array), ...]}."""
    with h5py.File(path, "w") as file:
        group = file.require_group(root)
        names = np.array_split(np.array([name.encode() for name in layers]), chunks)
        for i, chunk in enumerate(names):
            group.attrs[f"layer_names{i}" if chunks > 1 else "layer_names"] = chunk
        for layer, arrays in layers.items():
            own = group.create_group(layer)
            own.attrs["weight_names"] = [f"{layer}/{weight}:0".encode() for weight, _ in arrays]
            for weight, array in arrays:
                own[f"{layer}/{weight}:0"] = array


def legacy_layers(path):
    """What write_legacy takes, of a file of Keras."""
    layers = {}
    with h5py.File(path) as file:
        for name in file.attrs["layer_names"]:
            keys = file[name].attrs["weight_names"]
            layers[name] = [(key.split("/")[-1], file[name][key][()]) for key in keys]
    return layers


@needs_keras
@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_those_of_keras(reference, name):
    folder = reference(name)
    even, odd = keras_parity.image_sizes(name)
    model, variables = interop.from_keras(name, folder / "current.weights.h5")
    with np.load(folder / "reference.npz") as arrays:
        assert sum(x.size for x in jax.tree.leaves(variables["params"])) == arrays["params"]
    assert difference(folder, even, model, variables) < TOLERANCE
    model, legacy = interop.from_keras(name, folder / "legacy.h5")
    assert equal(variables, legacy)
    assert difference(folder, odd, model, legacy) < TOLERANCE
    assert "keras" not in sys.modules


@needs_keras
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("resnet50", {"bn_epsilon": 1e-5}),
        ("resnet50", {"stride_in": "3x3"}),
        ("preact_resnet50", {"bn_epsilon": 1e-5}),
        ("preact_resnet50", {"stem_pool": "symmetric"}),
        ("preact_resnet50", {"downsample": "first"}),
        ("densenet121", {"bn_epsilon": 1e-5}),
        ("inception_v3", {"bn_epsilon": 1e-5}),
        ("inception_v3", {"count_padding": True}),
    ],
)
def test_every_convention_is_seen(reference, name, override):
    folder = reference(name)
    size = keras_parity.image_sizes(name)[0]
    model, variables = interop.from_keras(name, folder / "legacy.h5", **override)
    assert difference(folder, size, model, variables) > 3 * TOLERANCE


@needs_keras
@pytest.mark.parametrize("name", NAMES)
def test_files_without_the_layers_names_go_by_the_models_order(reference, tmp_path, name):
    folder, path = reference(name), tmp_path / "nameless.weights.h5"
    shutil.copy(folder / "current.weights.h5", path)
    with h5py.File(path, "a") as file:
        for layer in file["layers"].values():
            layer.get("vars", layer).attrs.pop("name", None)
    expected = interop.from_keras(name, folder / "current.weights.h5")[1]
    assert equal(expected, interop.from_keras(name, path)[1])


@needs_keras
def test_counted_names_start_anywhere(reference, tmp_path):
    folder = reference("inception_v3")
    layers = legacy_layers(folder / "legacy.h5")
    counted = re.compile(r"(conv2d|batch_normalization)(?:_(\d+))?")
    shifted = {}
    for name, arrays in layers.items():
        match = counted.fullmatch(name)
        shifted[f"{match[1]}_{int(match[2] or 0) + 95}" if match else name] = arrays
    write_legacy(tmp_path / "shifted.h5", shifted)
    expected = interop.from_keras("inception_v3", folder / "legacy.h5")[1]
    assert equal(expected, interop.from_keras("inception_v3", tmp_path / "shifted.h5")[1])


def small(**changes):
    """The layers of a DenseNet's file: zeros, of the right shapes, but for the changes."""
    model = resflax.create_model("densenet121")
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    params = shapes["params"]
    layers = {}
    for layer in (*interop.LAYOUTS["densenet121"].layers(model, ()), interop.HEAD):
        leaf = params
        for part in layer.module:
            leaf = leaf.get(part, {})
        # Of a batch norm, all four arrays have the shape of the scale.
        arrays = [leaf["scale"]] * 4 if "scale" in leaf else [leaf.get("kernel"), leaf.get("bias")]
        arrays = [(str(i), np.zeros(x.shape, np.float32)) for i, x in enumerate(arrays) if x]
        if arrays:
            layers[layer.name or "predictions"] = arrays
    return {**layers, **changes}


def test_older_names_and_whole_models(tmp_path):
    random = np.random.default_rng(0)
    layers = {
        name: [(weight, random.normal(size=x.shape).astype(np.float32)) for weight, x in arrays]
        for name, arrays in small().items()
    }
    write_legacy(tmp_path / "new.h5", layers)
    old = {"conv1_conv": "conv1/conv", "conv1_bn": "conv1/bn", "predictions": "fc1000"}
    layers = {old.get(name, name): arrays for name, arrays in layers.items()}
    write_legacy(tmp_path / "old.h5", layers, root="model_weights", chunks=3)
    expected = interop.from_keras("densenet121", tmp_path / "new.h5")[1]
    assert equal(expected, interop.from_keras("densenet121", tmp_path / "old.h5")[1])
    assert expected["params"]["stem"]["conv"]["kernel"].std() > 0.9


def test_the_top_is_made_anew_on_demand(tmp_path):
    layers = small()
    del layers["predictions"]
    write_legacy(tmp_path / "notop.h5", layers)
    with pytest.raises(ValueError, match=r"no classifier .* num_classes"):
        interop.from_keras("densenet121", tmp_path / "notop.h5")
    model, variables = interop.from_keras("densenet121", tmp_path / "notop.h5", num_classes=7)
    assert model.num_classes == 7
    assert variables["params"]["head"]["kernel"].shape == (1024, 7)
    assert 0 < abs(variables["params"]["head"]["kernel"]).max() <= 1 / 32
    assert variables["params"]["head"]["bias"].shape == (7,)


@pytest.mark.long
def test_a_file_without_a_top_starts_a_training(tmp_path):
    layers = small()
    del layers["predictions"]
    write_legacy(tmp_path / "notop.hdf5", layers)
    changes = {"name": "densenet121", "bn_epsilon": 1.001e-5}
    for field in ("depth", "num_filters", "cardinality", "base_width", "se_reduction"):
        changes[field] = None
    config = plain.config(**{f"model.{k}": v for k, v in changes.items()})
    config.init_from = str(tmp_path / "notop.hdf5")
    model = config_lib.build_model(config, 3)
    state = jax.eval_shape(
        lambda: create_train_state(model, optax.sgd(0.1), (64, 64, 3), 0, ema=False)
    )
    # Without an initialisation, which takes many times as long.
    params, stats = jax.tree.map(
        lambda x: jax.device_put(np.ones(x.shape, x.dtype)), (state.params, state.batch_stats)
    )
    state = state.replace(params=params, batch_stats=stats)
    started = transfer.start(state, config, ("a", "b", "c"))
    values = {
        part: np.unique(jax.tree.leaves(tree)[0]).tolist() for part, tree in started.params.items()
    }
    assert values.pop("head") == [1]
    assert all(value == [0] for value in values.values())


def test_without_h5py_a_line_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "model.h5").write_bytes(b"never read")
    monkeypatch.setitem(sys.modules, "h5py", None)  # as if it were not installed
    with pytest.raises(resflax.UserError, match=r"model.h5 is read by h5py: pip install 'resflax"):
        interop.from_keras("densenet121", tmp_path / "model.h5")


def test_the_number_of_classes_is_the_files(tmp_path):
    head = [("kernel", np.ones((1024, 3), np.float32)), ("bias", np.ones(3, np.float32))]
    write_legacy(tmp_path / "three.h5", small(predictions=head))
    model, variables = interop.from_keras("densenet121", tmp_path / "three.h5")
    assert model.num_classes == 3
    assert equal(variables["params"]["head"], {"kernel": head[0][1], "bias": head[1][1]})


def test_what_does_not_fit_is_named(tmp_path):
    layers = small(
        bn=[("gamma", np.zeros(3, np.float32))] * 4,
        dense_9=[("kernel", np.zeros((2, 1000), np.float32))],
    )
    del layers["pool2_conv"]
    path = tmp_path / "wrong.h5"
    layers["bn"] = [(str(i), array) for i, (_, array) in enumerate(layers["bn"])]
    write_legacy(path, layers)
    with pytest.raises(ValueError, match="do not fit") as error:
        interop.from_keras("densenet121", path)
    message = str(error.value)
    assert "1 missing: pool2_conv/kernel [1, 1, 256, 128]" in message
    assert "1 unexpected: dense_9/kernel [2, 1000]" in message
    assert "4 of another shape: bn/gamma [3] where [1024] is expected" in message


def test_layers_with_counted_names_that_are_missing_are_named_by_their_place(tmp_path):
    convs = {f"conv2d_{i}": [("kernel", np.zeros((3, 3, 3, 32), np.float32))] for i in range(3)}
    write_legacy(tmp_path / "short.h5", convs)
    with pytest.raises(ValueError, match=r"missing: .* of stem/conv1/norm/beta \[32\]"):
        interop.from_keras("inception_v3", tmp_path / "short.h5", num_classes=5)


def test_files_that_are_not_keras(tmp_path):
    path = tmp_path / "weights.h5"
    with pytest.raises(FileNotFoundError):
        interop.from_keras("resnet50", path)
    path.write_bytes(b"PK\x03\x04, a zip archive")
    with pytest.raises(ValueError, match=r"weights.h5 is not an HDF5 file\.$"):
        interop.from_keras("resnet50", path)
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("model.weights.h5", b"")
    with pytest.raises(ValueError, match=r"is not an HDF5 file; unpack the model.weights.h5 in it"):
        interop.from_keras("resnet50", tmp_path / "model.keras")
    with h5py.File(path, "w") as file:
        file["weights"] = np.zeros(3)
    with pytest.raises(ValueError, match="not of Keras"):
        interop.from_keras("resnet50", path)


def test_names_that_keras_has_not():
    with pytest.raises(ValueError, match=r"'resnet18' .* resnet50, "):
        interop.from_keras("resnet18", "weights.h5")
