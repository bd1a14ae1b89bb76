"""Where images come from, chosen by `config.data.source`."""

import concurrent.futures
import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import ml_collections
import numpy as np
from PIL import Image

from resflax.data import arrays, decoding, folder, shapes, shares, tfds
from resflax.data.bad import BadImages, BadImagesError
from resflax.data.examples import ArraySource, DecodedSource, Source, Stored
from resflax.errors import UserError

# Images whose mean and standard deviation stand for those of a data set that is not in memory.
_SAMPLE = 1000

# Images that are counted at a time.
_CHUNK = 256

# Of decoded images in memory.
_MOST_BYTES = 16 << 30

# A channel's variance, on a scale of 0 to 1, that is a rounding error: the channel never varies.
_NO_VARIANCE = 1e-12


@dataclasses.dataclass(frozen=True)
class Description:
    """What a network and its users must know of a data set.

    Attributes:
      name: of the source.
      image_shape: (H, W, C).
      label_names: by class.
      mean, std: of each channel of the training images, on a scale of 0 to 1.
    """

    name: str
    image_shape: tuple[int, ...]
    label_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """The number of labels."""
        return len(self.label_names)


def require_like(found: Description, trained: Description, where: str = "") -> None:
    """Raises UserError if a network that was trained on one data set cannot judge another.

    Both must have the same number of channels and the same classes in the same order. Classes that
    are named by their numbers have no names to compare.

    Args:
      found: of the images that it is given.
      trained: of those that it was trained on.
      where: place of the network, for the message: ' in FOLDER'.
    """
    what = (
        f"the images of {found.name!r} and those that the network{where} was trained on differ in"
    )
    for kind, theirs, ours in (
        ("channels", found.image_shape[-1], trained.image_shape[-1]),
        ("classes", found.num_classes, trained.num_classes),
    ):
        if theirs != ours:
            raise UserError(f"{what} the number of {kind}: {theirs} and {ours}.")
    if difference := other_names(found.label_names, trained.label_names):
        raise UserError(f"{what} their classes: {difference}.")


def other_names(found: Sequence[str], trained: Sequence[str]) -> str | None:
    """How the names of as many classes differ; None if they do not, or either has none.

    Args:
      found: by class; the classes' numbers, where nobody named them.
      trained: likewise.
    """
    numbers = tuple(map(str, range(len(found))))
    if numbers in (tuple(found), tuple(trained)):
        return None
    for label, (theirs, ours) in enumerate(zip(found, trained, strict=True)):
        if theirs != ours:
            return f"number {label} is {theirs!r} and {ours!r}"
    return None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a test set, and perhaps one to validate on.

    Attributes:
      train, test: the examples.
      description: what their users must know.
      bad: the images that could not be read.
      threads: that it pays to read with.
      test_crops: of an image, whose predictions are averaged: 1, or 10 (see transforms.ten_crop);
        then the test images are larger than those to train on.
      val: examples to choose the best state by, so that the test set stays out of it; None: there
        are none.
      further: others that a run evaluates at the end, by name.
    """

    train: Source
    test: Source
    description: Description
    bad: BadImages
    threads: int = 1
    test_crops: int = 1
    val: Source | None = None
    further: Mapping[str, Source] = dataclasses.field(default_factory=dict)

    @property
    def evaluated(self) -> Source:
        """What a run is evaluated on while it trains: `val`, or else `test`."""
        return self.test if self.val is None else self.val


@dataclasses.dataclass(frozen=True)
class Raw:
    """What a source has, before anything is decoded.

    Attributes:
      train, test: the examples.
      label_names: by class.
      mean, std: of each channel, as published; (): nobody says.
      channels: of encoded images.
      image_shape: (H, W, C) of arrays that are read one by one; None: encoded images are.
      notes: lines about what a person may miss in it.
      val: examples to choose the best state by; None: it has none of its own.
      further: others to evaluate at the end, by name.
    """

    train: Stored
    test: Stored
    label_names: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    channels: int = 3
    image_shape: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    val: Stored | None = None
    further: Mapping[str, Stored] = dataclasses.field(default_factory=dict)


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=3)  # of who calls load


def load(
    config: ml_collections.ConfigDict,
    report: Callable[[str], None] = _warn,
    raw: Raw | None = None,
) -> Dataset:
    """Opens the data set that `config.data` names; nothing is downloaded.

    Args:
      config: `config.data`.
      report: called with each line about what a person may miss in it: files that are left out,
        classes that are not evaluated.
      raw: what its source has; None: it is asked.

    Raises:
      UserError: if it is not there, or is none.
    """
    if raw is None:
        raw = SOURCES[config.source](config)
    for line in raw.notes:
        report(line)
    stored = _stored(raw, config)
    bad = BadImages(int(config.max_bad * sum(map(len, stored.values()))))
    threads = config.threads or os.cpu_count() or 1
    size, in_memory = image_size(config), config.crop == "center" and not raw.image_shape
    parts: dict[str, ArraySource | DecodedSource] = {}
    for part, examples in stored.items():
        larger = part != "train" and config.test_crops > 1
        source = readable(raw, examples, config, config.eval_resize if larger else size, bad)
        parts[part] = _in_memory(source, threads) if in_memory else source
    train, test = parts["train"], parts["test"]
    mean, std = config.mean or raw.mean, config.std or raw.std
    if not mean:
        mean, std = _statistics(_sample(train if len(train) else test).images)
    image_shape = train.image_shape
    if len(mean) != image_shape[-1]:
        raise UserError(
            f"config.data.mean {mean} has {len(mean)} numbers; the images of {config.source!r} "
            f"have {image_shape[-1]} channels."
        )
    description = Description(
        name=config.source,
        image_shape=image_shape,
        label_names=raw.label_names,
        mean=tuple(mean),
        std=tuple(std),
    )
    # One thread is enough for arrays.
    threads = threads if isinstance(train, DecodedSource) else 1
    further = {name: parts[f"eval_{name}"] for name in raw.further}
    val = parts.get("val")
    return Dataset(train, test, description, bad, threads, config.test_crops, val, further)


def _stored(raw: Raw, config: ml_collections.ConfigDict) -> dict[str, Stored]:
    """The examples of 'train' and 'test', of 'val' where there are some, and of 'eval_NAME'."""
    if config.test_crops > 1 and (isinstance(raw.test, ArraySource) or raw.image_shape):
        raise UserError(
            f"config.data.test_crops {config.test_crops} are of image files, which are resized to "
            f"config.data.eval_resize; the images of {config.source!r} have a size of their own."
        )
    if raw.val is not None and config.val_share:
        raise UserError(
            f"config.data.val_share {config.val_share:g} must be 0: the images of "
            f"{config.source!r} have some to validate on already."
        )
    train, val = shares.divided(raw.train, config, len(raw.label_names))
    val = raw.val if val is None else val
    parts = {"train": train, "test": raw.test} | ({} if val is None else {"val": val})
    return parts | {f"eval_{name}": part for name, part in raw.further.items()}


def image_size(config: ml_collections.ConfigDict) -> int:
    """Side of the images to train on, pixels; saved arrays keep their own.

    Args:
      config: `config.data`: `image_size`, or where it is 0 the usual one of its TFDS data set.

    Raises:
      UserError: if it is 0 and there is no usual one.
    """
    if config.image_size:
        return config.image_size
    usual = tfds.defaults(config.tfds.name) if config.source == "tfds" else None
    if usual is None:
        raise UserError(
            f"config.data.image_size 0 is the usual size of a common TFDS data set "
            f"({', '.join(tfds.DEFAULTS)}); of others, say which."
        )
    return usual.image_size


def readable(
    raw: Raw, examples: Stored, config: ml_collections.ConfigDict, size: int, bad: BadImages
) -> ArraySource | DecodedSource:
    """A source of what is stored, decoded as `config.data` says.

    Args:
      raw: tells what is stored.
      examples: of it.
      config: `config.data`.
      size: side of decoded images, pixels.
      bad: takes down what cannot be read.
    """
    if isinstance(examples, ArraySource):
        return examples
    if raw.image_shape:

        def as_it_is(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
            return image

        return DecodedSource(examples, as_it_is, as_it_is, raw.image_shape, bad)
    resize, channels = config.eval_resize or size, raw.channels

    def decode_test(data: decoding.Picture, rng: np.random.Generator) -> np.ndarray:
        return decoding.center_crop(data, size, resize=resize, channels=channels)

    def resized(data: decoding.Picture, rng: np.random.Generator) -> np.ndarray:
        scale, ratio = config.crop_scale, config.crop_ratio
        return decoding.random_resized_crop(
            data, size, rng, scale=scale, ratio=ratio, channels=channels
        )

    def scaled(data: decoding.Picture, rng: np.random.Generator) -> np.ndarray:
        shorter = config.crop_shorter
        return decoding.scale_crop(data, size, rng, shorter=shorter, channels=channels)

    decode_train = {"center": decode_test, "resized": resized, "scale": scaled}[config.crop]
    return DecodedSource(examples, decode_train, decode_test, (size, size, channels), bad)


def _in_memory(source: ArraySource | DecodedSource, threads: int) -> ArraySource:
    """All readable images, decoded once."""
    if isinstance(source, ArraySource):
        return source
    _require_memory(
        len(source),
        source.image_shape,
        "set config.data.crop to 'resized' or 'scale', which decode them when they are read.",
    )
    indices = np.array_split(np.arange(len(source)), max(1, len(source) // 64))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        batches = list(pool.map(source.test_batch, indices))
    read = np.concatenate([batch["mask"] for batch in batches]) == 1
    if len(source) and not read.any():
        raise BadImagesError("none of the images can be read.")
    images, labels = (np.concatenate([b[name] for b in batches]) for name in ("image", "label"))
    return ArraySource(images[read], labels[read])


def _require_memory(count: int, shape: tuple[int, ...], hint: str) -> None:
    """Raises UserError, which says what to do, if so many images are too many for the memory."""
    size = count * math.prod(shape)
    if size > _MOST_BYTES:
        raise UserError(
            f"{count:,} images of {shape} are {size / 2**30:,.0f} GiB, too many to be kept in "
            f"memory: {hint}"
        )


def _sample(source: ArraySource | DecodedSource) -> ArraySource:
    """Some of the images, for their statistics: all, if they are in memory."""
    if isinstance(source, ArraySource):
        return source
    chosen = np.random.default_rng(0).permutation(len(source))[:_SAMPLE]
    batches = [source.test_batch(chosen[i : i + 64]) for i in range(0, len(chosen), 64)]
    read = [batch["image"][batch["mask"] == 1] for batch in batches]
    return ArraySource(np.concatenate(read), np.empty(0, np.int32))


def _statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, on a scale of 0 to 1.

    A channel that never varies has the deviation 1: it is only centred.
    """
    # From counts of the 256 values, so that nothing as large as the images is made of them.
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), _CHUNK):
        pixels = images[start : start + _CHUNK].reshape(-1, images.shape[-1])
        counts += [np.bincount(channel, minlength=256) for channel in pixels.T]
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(1)
    variance = counts @ values**2 / counts.sum(1) - mean**2
    std = np.sqrt(np.where(variance > _NO_VARIANCE, variance, 1.0))
    return mean.tolist(), std.tolist()


def digits(config: ml_collections.ConfigDict) -> Raw:
    """scikit-learn's handwritten digits: 1,797 real 8x8 grey images, in its package.

    1,437 images are for training and 360 for testing: scikit-learn's `train_test_split`, stratified
    by class, random_state 0.

    Args:
      config: `config.data`, whose `image_size` they are enlarged to (bicubic), pixels.
    """
    # Imported here: it takes a second, and the other sources do without.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    shape = (config.image_size, config.image_size, 1)
    _require_memory(len(pixels), shape, f"config.data.image_size {config.image_size} is too large.")
    pixels = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    side = (config.image_size, config.image_size)
    images = np.stack(
        [np.asarray(Image.fromarray(p).resize(side, Image.Resampling.BICUBIC)) for p in pixels]
    )
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, random_state=0, stratify=labels
    )
    source = ArraySource(images[..., None], labels.astype(np.int32))
    return Raw(_subset(source, train), _subset(source, test), tuple("0123456789"))


def procedural_shapes(config: ml_collections.ConfigDict) -> Raw:
    """Rendered images of ten shapes, the first for training: see resflax.data.shapes.

    Args:
      config: `config.data`: `image_size`, and of `config.data.shapes` the numbers of images, the
        seed and the difficulty.
    """
    options = config.shapes
    end = options.num_train + options.num_test
    shape = (config.image_size, config.image_size, 3)
    _require_memory(end, shape, "take a smaller config.data.image_size, or fewer images.")
    images, labels = shapes.render(
        range(end), seed=options.seed, size=config.image_size, difficulty=options.difficulty
    )
    source = ArraySource(images, labels)
    train, test = np.split(np.arange(end), [options.num_train])
    return Raw(_subset(source, train), _subset(source, test), shapes.LABEL_NAMES)


def image_folder(config: ml_collections.ConfigDict) -> Raw:
    """A directory of JPEGs and PNGs by class: see resflax.data.folder."""
    options = config.folder
    notes: list[str] = []
    train, test, names = folder.examples(
        options.path, val_share=options.val_share, seed=options.seed, report=notes.append
    )
    source = folder.FolderSource.of
    return Raw(source(train), source(test), names, notes=tuple(notes))


def saved_arrays(config: ml_collections.ConfigDict) -> Raw:
    """Images saved as arrays, or in the files of MNIST: see resflax.data.arrays."""
    a = arrays.load(config.arrays.path)
    train = ArraySource(a.train_images, a.train_labels)
    return Raw(train, ArraySource(a.test_images, a.test_labels), a.label_names)


def prepared_by_tfds(config: ml_collections.ConfigDict) -> Raw:
    """A data set that TensorFlow Datasets has prepared: see resflax.data.tfds."""
    found = tfds.open_dataset(**config.tfds)
    usual = tfds.defaults(config.tfds.name)
    return Raw(
        found.train if found.encoded else _stacked(found.train),
        found.test if found.encoded else _stacked(found.test),
        found.label_names,
        mean=usual.mean if usual else (),
        std=usual.std if usual else (),
        channels=found.image_shape[-1] or 3,
        val=found.val if found.val is None or found.encoded else _stacked(found.val),
    )


def given_by_the_caller(config: ml_collections.ConfigDict) -> NoReturn:
    """Images that nobody but the caller has: see resflax.data.given.

    Raises:
      UserError: always; what to pass.
    """
    raise UserError(
        "config.data.source 'given' stands for images of the caller's own, which no directory has: "
        "pass them as dataset=..., or name other ones of the same size and classes, such as "
        "{'source': 'folder', 'folder.path': 'DIR', 'image_size': N} (--data source=folder "
        "--data folder.path=DIR --data image_size=N)."
    )


# Values of config.data.crop.
CROPS = ("center", "resized", "scale")

# Values of config.data.source.
SOURCES: dict[str, Callable[[ml_collections.ConfigDict], Raw]] = {
    "digits": digits,
    "shapes": procedural_shapes,
    "folder": image_folder,
    "arrays": saved_arrays,
    "tfds": prepared_by_tfds,
    "given": given_by_the_caller,
}


def _subset(source: ArraySource, indices: np.ndarray) -> ArraySource:
    return ArraySource(source.images[indices], source.labels[indices])


def _stacked(examples: tfds.TfdsSource) -> ArraySource:
    """Images that are stored as arrays of one shape."""
    read = [examples[i] for i in range(len(examples))]
    return ArraySource(
        np.stack([example["image"] for example in read]),
        np.array([example["label"] for example in read], np.int32),
    )
