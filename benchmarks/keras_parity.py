"""The same logits as keras.applications, measured: python -m benchmarks.keras_parity.

Networks of Keras get random weights and running statistics, so nothing is downloaded and every
weight counts; a file that Keras saved is read, and both see the same random images. Needs Keras.

Usage:
  python -m benchmarks.keras_parity [NAME ...] [--results results/parity_keras.csv]
"""

import csv
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from resflax.interop import keras as interop
from resflax.interop.weights import Variables
from resflax.process.arguments import Parser, path_option

# Keras' names, by ours.
APPLICATIONS: dict[str, str] = {
    **{f"resnet{depth}": f"ResNet{depth}" for depth in (50, 101, 152)},
    **{f"preact_resnet{depth}": f"ResNet{depth}V2" for depth in (50, 101, 152)},
    **{f"densenet{depth}": f"DenseNet{depth}" for depth in (121, 169, 201)},
    "inception_v3": "InceptionV3",
    "inception_resnet_v2": "InceptionResNetV2",
}

COLUMNS = (
    "model",
    "overrides",
    "peer",
    "library",
    "image_size",
    "params",
    "difference",
    "jax",
    "peer_version",
)


def image_sizes(name: str) -> tuple[int, int]:
    """Small images of an even and an odd side, on which every convolution has some pixels."""
    return (128, 107) if name.startswith("inception") else (64, 75)


def write_reference(name: str, sizes: Iterable[int], folder: str | os.PathLike[str]) -> None:
    """Saves a network of Keras with random weights, and what it makes of random images.

    To be called in a process of its own: Keras asks for implicit rank promotion, and warns.

    Args:
      name: of ours, a key of APPLICATIONS.
      sizes: sides of the images, pixels.
      folder: gets 'current.weights.h5', 'legacy.h5' and 'reference.npz': 'version' of Keras,
        'params', the number of trainable ones, and for every size 'images<size>' and
        'logits<size>', of two images.
    """
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import h5py
    import keras
    from keras.src.legacy.saving import legacy_h5_format

    folder = pathlib.Path(folder)
    random = np.random.default_rng(0)
    sizes = tuple(sizes)
    application = getattr(keras.applications, APPLICATIONS[name])
    shape = (sizes[0], sizes[0], 3)
    model = application(weights=None, input_shape=shape, classifier_activation=None)
    for layer in model.layers:
        layer.set_weights(_random_weights(random, layer))
    model.save_weights(folder / "current.weights.h5")
    with h5py.File(folder / "legacy.h5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
    results: dict[str, Any] = {
        "version": keras.__version__,
        "params": sum(int(np.prod(w.shape)) for w in model.trainable_weights),
    }
    for size in sizes:
        images = results[f"images{size}"] = _random_images(random, size)
        # `call` takes images of any size, where the model itself holds to the size that it has.
        logits = jax.jit(functools.partial(model.call, training=False))(images)
        results[f"logits{size}"] = np.asarray(logits)
    np.savez(folder / "reference.npz", **results)


def _random_images(random: np.random.Generator, size: int) -> np.ndarray:
    """Two images of patches and noise: of noise alone, all means over the positions are alike."""
    patches = random.normal(size=(2, 4, 4, 3)).repeat(size // 4 + 1, 1).repeat(size // 4 + 1, 2)
    noise = random.normal(size=(2, size, size, 3))
    return (patches[:, :size, :size] + noise).astype(np.float32)


def _random_weights(random: np.random.Generator, layer: Any) -> list[np.ndarray]:
    """Weights that keep the activations' size, so that no layer's effect is lost."""
    normal = {w.name: random.normal(size=w.shape) for w in layer.weights}
    if "kernel" in normal:
        # The branches of many residual blocks add up.
        gain = 0.1 if layer.name.endswith("_3_conv") else 2.0
        normal["kernel"] *= np.sqrt(gain / np.prod(normal["kernel"].shape[:-1]))
    # Some variances are as small as Keras' epsilons, which are seen then.
    low = 1e-6 if "gamma" in normal else 0.5
    variance = np.exp(random.uniform(np.log(low), 0.0, normal.get("beta", np.zeros(0)).shape))
    values = {
        "kernel": lambda x: x,
        "bias": lambda x: 0.3 * x,
        "gamma": lambda x: np.sqrt(variance + 1e-5) * np.exp(0.3 * x),
        "beta": lambda x: 0.3 * x,
        "moving_mean": lambda x: 0.3 * x,
        "moving_variance": lambda x: variance,
    }
    return [values[name](x).astype(np.float32) for name, x in normal.items()]


def difference(model: nn.Module, variables: Variables, reference: Any, size: int) -> float:
    """The largest difference of the logits, as a share of Keras' largest.

    Args:
      model: of ours.
      variables: of the model.
      reference: of `write_reference`, loaded.
      size: one of the sides of its images, pixels.
    """
    apply = jax.jit(lambda images: model.apply(variables, images, train=False))
    expected = reference[f"logits{size}"]
    return float(
        np.abs(apply(reference[f"images{size}"]) - expected).max() / np.abs(expected).max()
    )


def rows(name: str) -> list[dict[str, Any]]:
    """Compares a network with Keras' on images of two sizes: rows of COLUMNS."""
    sizes = image_sizes(name)
    with tempfile.TemporaryDirectory() as folder:
        write_reference(name, sizes, folder)
        path = pathlib.Path(folder)
        reference = np.load(path / "reference.npz")
        # Both files, one for each size.
        files = (path / "current.weights.h5", path / "legacy.h5")
        results = []
        for file, size in zip(files, sizes, strict=True):
            model, variables = interop.from_keras(name, file)
            values = (
                name,
                json.dumps(interop.LAYOUTS[name].overrides),
                APPLICATIONS[name],
                "keras",
                size,
                sum(x.size for x in jax.tree.leaves(variables["params"])),
                f"{difference(model, variables, reference, size):.1e}",
                jax.__version__,
                str(reference["version"]),
            )
            results.append(dict(zip(COLUMNS, values, strict=True)))
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the rows of the named networks, or of all, and appends them to a table."""
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--results", type=path_option, help="a CSV table that gets the rows")
    flags = parser.parse_args(arguments)
    unknown = sorted(set(flags.names) - set(APPLICATIONS))
    if unknown:
        parser.error(
            f"no such networks: {', '.join(unknown)}; there are {', '.join(APPLICATIONS)}."
        )
    for name in flags.names or APPLICATIONS:
        for row in rows(name):
            print(*row.values(), sep="  ", flush=True)
            if flags.results is not None:
                _append(flags.results, row)


def _append(path: pathlib.Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
