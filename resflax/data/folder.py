"""Images in a directory of class directories: FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg.

Without train/ and val/, FOLDER/CLASS/*.jpg, of which a share is set aside, seeded, class by class.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from resflax import arguments
from resflax.data.bad import UnreadableImage
from resflax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png")

# A labelled file.
Example = tuple[pathlib.Path, int]


class FolderError(UserError):
    """The directory holds no data set; the message says which file or directory and why."""


def examples(
    folder: str | pathlib.Path, *, val_share: float, seed: int
) -> tuple[list[Example], list[Example], tuple[str, ...]]:
    """The files to train on, those to evaluate on, and the names of the classes, sorted.

    Args:
      folder: of train/ and val/, or of one directory for each class.
      val_share: where there is no val/, the share of each class to evaluate on, rounded.
      seed: of the choice of it.

    Raises:
      FolderError: if there are fewer than two classes, or a class has no images.
    """
    folder = arguments.path(folder)
    if not os.path.isdir(folder):
        raise FolderError(f"config.data.folder.path {str(folder)!r} is not a directory.")
    if (folder / "train").is_dir():
        train, names = _labelled(folder / "train")
        if not (folder / "val").is_dir():
            raise FolderError(f"{folder} has train/ but no val/ beside it.")
        val, val_names = _labelled(folder / "val")
        if set(val_names) - set(names):
            extra = ", ".join(sorted(set(val_names) - set(names)))
            raise FolderError(f"{folder}/val has classes that train/ has not: {extra}.")
        return train, [(path, names.index(path.parent.name)) for path, _ in val], names
    files, names = _labelled(folder)
    order = np.random.default_rng(seed).permutation(len(files))
    train, val = [], []
    for label, name in enumerate(names):
        own = [files[i] for i in order if files[i][1] == label]
        held_out = round(val_share * len(own))
        if not 0 < held_out < len(own):
            raise FolderError(
                f"{folder / name}: config.data.folder.val_share {val_share} of {len(own)} images "
                f"is {held_out}: some must be left to train on and some to evaluate on."
            )
        val += own[:held_out]
        train += own[held_out:]
    return sorted(train), sorted(val), names


def _labelled(folder: pathlib.Path) -> tuple[list[Example], tuple[str, ...]]:
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    if len(names) < 2:
        raise FolderError(
            f"{folder} has {len(names)} directories of classes; a data set has two at least."
        )
    files = []
    for label, name in enumerate(names):
        own = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in EXTENSIONS)
        if not own:
            raise FolderError(f"{folder / name} has no images ({', '.join(EXTENSIONS)}).")
        files += [(path, label) for path in own]
    return files, names


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Files as they are, to be decoded where they are needed.

    `source[i]` is `{'image': bytes, 'label': int32 []}`: grain's RandomAccessDataSource.

    Attributes:
      files: paths. Strings: a million of them take a third of the memory of `pathlib`'s.
      labels: int32 [N].
    """

    files: Sequence[str]
    labels: np.ndarray

    @classmethod
    def of(cls, files: Sequence[Example]) -> Self:
        """The source of labelled files."""
        labels = np.array([label for _, label in files], np.int32)
        return cls([str(path) for path, _ in files], labels)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises UnreadableImage if the file cannot be opened."""
        return {"image": read(self.files[index]), "label": self.labels[index]}

    def name(self, index: int) -> str:
        """What a person finds an example by: its file."""
        return self.files[index]


def read(path: str | pathlib.Path) -> bytes:
    """A file as it is.

    Raises:
      UnreadableImage: if the system does not let it be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UnreadableImage(f"it cannot be opened: {error.strerror}") from None
