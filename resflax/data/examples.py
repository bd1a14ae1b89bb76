"""Examples to train on and to evaluate on: arrays in memory, or images decoded when read."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from resflax.data.bad import BadImages, BadImagesError, UnreadableImage

Example = dict[str, Any]
Batch = dict[str, np.ndarray]

# From an image as it is stored and a source of random numbers to uint8 [H, W, C].
Decode = Callable[[Any, np.random.Generator], np.ndarray]

# So many other images are tried in the place of one that cannot be read.
_DRAWS = 100


class Source(Protocol):
    """Examples, read at random and by several threads at once."""

    def __len__(self) -> int:
        """Their number."""

    def __getitem__(self, index: int) -> Example:
        """{'image': uint8 [H, W, C], 'label': int32 []}."""

    def train_batch(self, indices: np.ndarray, seeds: np.ndarray) -> Batch:
        """'image' [N, H, W, C] and 'label' [N] of some examples, to train on.

        Args:
          indices: of the examples.
          seeds: of the random numbers of each.
        """

    def test_batch(self, indices: np.ndarray) -> Batch:
        """Likewise, with a 'mask': 0 for indices behind the last one, and what is unreadable."""


class EncodedExamples(Protocol):
    """Examples whose images are read when they are asked for: files, or the like."""

    def __len__(self) -> int:
        """Their number."""

    def __getitem__(self, index: int) -> Example:
        """{'image': bytes (say), 'label': int32 []}; raises UnreadableImage if there is none."""

    def name(self, index: int) -> str:
        """What a person finds the image by."""


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

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return self.images.shape[1:]

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": self.labels[index]}

    def train_batch(self, indices: np.ndarray, seeds: np.ndarray) -> Batch:
        """See Source; nothing is random here."""
        return {"image": self.images[indices], "label": self.labels[indices]}

    def test_batch(self, indices: np.ndarray) -> Batch:
        """See Source."""
        mask = (indices < len(self)).astype(np.float32)
        return self.train_batch(np.minimum(indices, len(self) - 1), indices) | {"mask": mask}


# Examples before anything is decoded.
Stored = ArraySource | EncodedExamples


@dataclasses.dataclass(frozen=True)
class Selected:
    """Some of other examples, perhaps with other labels: EncodedExamples.

    Attributes:
      examples: the others.
      rows: int [N], which of them.
      shifts: int [N], what is added to their labels.
      num_classes: of the sum, the remainder by this is the label.
    """

    examples: EncodedExamples
    rows: np.ndarray
    shifts: np.ndarray
    num_classes: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Raises UnreadableImage likewise."""
        example = self.examples[int(self.rows[index])]
        label = (example["label"] + self.shifts[index]) % self.num_classes
        return example | {"label": np.int32(label)}

    def name(self, index: int) -> str:
        """That of the other."""
        return self.examples.name(int(self.rows[index]))


@dataclasses.dataclass(frozen=True)
class DecodedSource:
    """Encoded images, decoded whenever they are read.

    Attributes:
      examples: the images.
      decode_train: a random crop.
      decode_test: the crop to evaluate.
      image_shape: of what both give out.
      bad: takes down what cannot be read.
    """

    examples: EncodedExamples
    decode_train: Decode
    decode_test: Decode
    image_shape: tuple[int, ...]
    bad: BadImages

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        """The crop to evaluate; raises UnreadableImage."""
        example = self.examples[index]
        return example | {"image": self.decode_test(example["image"], np.random.default_rng(0))}

    def train_batch(self, indices: np.ndarray, seeds: np.ndarray) -> Batch:
        """See Source. In the place of an unreadable image another is drawn: batches stay whole."""
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        for place, (index, seed) in enumerate(zip(indices, seeds, strict=True)):
            rng = np.random.default_rng(seed)
            for _ in range(_DRAWS):
                read = self._read(int(index), self.decode_train, rng)
                if read is not None:
                    images[place], labels[place] = read
                    break
                index = rng.integers(len(self))
            else:
                raise BadImagesError(f"none of {_DRAWS} images in a row can be read.")
        return {"image": images, "label": labels}

    def test_batch(self, indices: np.ndarray) -> Batch:
        """See Source."""
        images = np.zeros((len(indices), *self.image_shape), np.uint8)
        labels = np.zeros(len(indices), np.int32)
        mask = np.zeros(len(indices), np.float32)
        for place, index in enumerate(indices):
            if index < len(self):
                rng = np.random.default_rng(0)
                read = self._read(int(index), self.decode_test, rng)
                if read is not None:
                    images[place], labels[place] = read
                    mask[place] = 1.0
        return {"image": images, "label": labels, "mask": mask}

    def _read(
        self, index: int, decode: Decode, rng: np.random.Generator
    ) -> tuple[np.ndarray, int] | None:
        try:
            example = self.examples[index]
            return decode(example["image"], rng), example["label"]
        except UnreadableImage as error:
            self.bad.add(self.examples.name(index), str(error))
            return None
