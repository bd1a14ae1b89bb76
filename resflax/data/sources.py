"""Where images come from: arrays of uint8 images and labels, read at random.

A source is anything with `len()` and `source[i] -> {'image': uint8 [H, W, C], 'label': int32 []}`:
grain's RandomAccessDataSource.
"""

import dataclasses

import ml_collections
import numpy as np
from PIL import Image

from resflax.data import folder, shapes


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images in memory.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int32 [N].
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}


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


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a test set."""

    train: ArraySource
    test: ArraySource
    description: Description


SOURCES = ("digits", "shapes", "folder")


def load(config: ml_collections.ConfigDict) -> Dataset:
    """Loads the data set that `config.data` names; nothing is downloaded."""
    if config.source == "digits":
        train, test = digits(config.image_size)
        names = tuple("0123456789")
    elif config.source == "folder":
        train, test, names = image_folder(config)
    else:
        train, test = procedural_shapes(config)
        names = shapes.LABEL_NAMES
    mean, std = config.mean, config.std
    if not mean:
        mean, std = _statistics(train.images)
    if len(mean) != train.images.shape[-1]:
        raise ValueError(
            f"config.data.mean {mean} has {len(mean)} numbers; the images of {config.source!r} "
            f"have {train.images.shape[-1]} channels."
        )
    description = Description(
        name=config.source,
        image_shape=train.images.shape[1:],
        label_names=names,
        mean=tuple(mean),
        std=tuple(std),
    )
    return Dataset(train, test, description)


def _statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, on a scale of 0 to 1."""
    pixels = images.reshape(-1, images.shape[-1]) / 255.0
    return pixels.mean(0).tolist(), pixels.std(0).tolist()


def digits(image_size: int) -> tuple[ArraySource, ArraySource]:
    """scikit-learn's handwritten digits: 1,797 real 8x8 grey images, in its package.

    Args:
      image_size: side to which the images are enlarged (bicubic), pixels.

    Returns:
      1,437 images for training and 360 for testing: scikit-learn's `train_test_split`, stratified
      by class, random_state 0.
    """
    # Imported here: it takes a second, and the other sources do without.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    pixels = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    side = (image_size, image_size)
    images = np.stack(
        [np.asarray(Image.fromarray(p).resize(side, Image.Resampling.BICUBIC)) for p in pixels]
    )
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, random_state=0, stratify=labels
    )
    source = ArraySource(images[..., None], labels.astype(np.int32))
    return _subset(source, train), _subset(source, test)


def image_folder(
    config: ml_collections.ConfigDict,
) -> tuple[ArraySource, ArraySource, tuple[str, ...]]:
    """A directory of JPEGs and PNGs by class, decoded into memory: see resflax.data.folder.

    Args:
      config: `config.data`: `image_size` and `config.data.folder`.

    Returns:
      The images to train on, those to evaluate on, and the names of the classes.
    """
    options = config.folder
    train, test, names = folder.examples(
        options.path, val_share=options.val_share, seed=options.seed
    )
    train_set, test_set = (
        ArraySource(*folder.load(files, config.image_size)) for files in (train, test)
    )
    return train_set, test_set, names


def procedural_shapes(config: ml_collections.ConfigDict) -> tuple[ArraySource, ArraySource]:
    """Rendered images of ten shapes: see resflax.data.shapes.

    Args:
      config: `config.data`: `image_size`, and of `config.data.shapes` the numbers of images, the
        seed and the difficulty.

    Returns:
      The first images of the seed for training, the next ones for testing.
    """
    options = config.shapes
    end = options.num_train + options.num_test
    images, labels = shapes.render(
        range(end), seed=options.seed, size=config.image_size, difficulty=options.difficulty
    )
    source = ArraySource(images, labels)
    train, test = np.split(np.arange(end), [options.num_train])
    return _subset(source, train), _subset(source, test)


def _subset(source: ArraySource, indices: np.ndarray) -> ArraySource:
    return ArraySource(source.images[indices], source.labels[indices])
