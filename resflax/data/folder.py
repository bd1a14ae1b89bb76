"""Images in a directory of class directories: FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg.

Without train/ and val/, FOLDER/CLASS/*.jpg, of which a share is set aside, seeded, class by class.

An image belongs to the class directory that it lies in, at any depth, through linked directories
too. Hidden files and directories, whose names begin with a dot, and those that systems put beside
a person's files are left out.
"""

import collections
import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, Self

import numpy as np

from resflax.data.bad import UnreadableImage
from resflax.errors import UserError
from resflax.process import arguments

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png")

# Of archives made on macOS, of Synology's disks (small copies of the images), of ext4.
_SYSTEM = ("__MACOSX", "@eaDir", "lost+found")

# Control characters, and what Python takes for the end of a line.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")

# A labelled file.
Example = tuple[pathlib.Path, int]

# Paths that are left out, by the reason.
_LeftOut = dict[str, list[pathlib.Path]]

_HIDDEN = "hidden"
_NO_IMAGE = f"not {', '.join(EXTENSIONS)}"
_LOOSE = "in no class directory"
_AGAIN = "linked to a directory that is read already"


class FolderError(UserError):
    """The directory holds no data set; the message says which file or directory and why."""


def examples(
    folder: str | pathlib.Path,
    *,
    val_share: float,
    seed: int,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[list[Example], list[Example], tuple[str, ...]]:
    """The files to train on, those to evaluate on, and the names of the classes, sorted.

    Args:
      folder: of train/ and val/, or of one directory for each class. A class that val/ lacks is
        not evaluated.
      val_share: where there is no val/, the share of each class to evaluate on, rounded; 1: all
        images, with none to train on.
      seed: of the choice of it.
      report: called with a line about what is left out, and one about classes without images in
        val/.

    Raises:
      FolderError: if there are fewer than two classes, a class has no images to train on, val/ has
        other classes or no images, or a directory cannot be read.
    """
    if not str(folder):
        raise FolderError("config.data.folder.path is empty: name the directory of the images.")
    folder = arguments.path(folder)
    if not os.path.isdir(folder):
        raise FolderError(f"config.data.folder.path {str(folder)!r} is not a directory.")
    left_out: _LeftOut = collections.defaultdict(list)
    if (folder / "train").is_dir():
        train, val, names = _two_splits(folder, left_out, report)
    else:
        classes = _training_classes(folder, left_out)
        train, val = _split(folder, classes, val_share, seed)
        names = list(classes)
    if left_out:
        report(_summary(folder, left_out))
    return train, val, tuple(map(printable, names))


def printable(path: str | os.PathLike[str]) -> str:
    r"""A path as any terminal or file can take it: bytes that are not UTF-8, say, as \xNN."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _two_splits(
    folder: pathlib.Path, left_out: _LeftOut, report: Callable[[str], None]
) -> tuple[list[Example], list[Example], list[str]]:
    """The images of train/ and val/, and the names of the classes."""
    classes = _training_classes(folder / "train", left_out)
    if not (folder / "val").is_dir():
        raise FolderError(f"{folder} has train/ but no val/ beside it.")
    evaluated = {k: files for k, files in _classes(folder / "val", left_out).items() if files}
    if not evaluated:
        raise FolderError(f"{folder / 'val'} has no images ({', '.join(EXTENSIONS)}) of a class.")
    if extra := ", ".join(name for name in evaluated if name not in classes):
        raise FolderError(f"{folder / 'val'} has classes that train/ has not: {extra}.")
    names = list(classes)
    if missing := [name for name in names if name not in evaluated]:
        report(
            f"{printable(folder / 'val')} has no images of {len(missing)} of {len(names)} classes, "
            f"which are not evaluated: {', '.join(map(printable, missing[:5]))}"
            f"{', ...' if len(missing) > 5 else ''}."
        )
    train, val = (
        [(path, label) for label, name in enumerate(names) for path in part.get(name, ())]
        for part in (classes, evaluated)
    )
    return train, val, names


def _split(
    folder: pathlib.Path, classes: dict[str, list[pathlib.Path]], val_share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """The images to train on, and a share of each class to evaluate on."""
    files = [(path, label) for label, own in enumerate(classes.values()) for path in own]
    if val_share == 1:
        return [], files
    shuffled: list[list[Example]] = [[] for _ in classes]
    for i in np.random.default_rng(seed).permutation(len(files)):
        shuffled[files[i][1]].append(files[i])
    train, val = [], []
    for name, own in zip(classes, shuffled, strict=True):
        held_out = round(val_share * len(own))
        if not 0 < held_out < len(own):
            raise FolderError(
                f"{folder / name}: config.data.folder.val_share {val_share} of {len(own)} images "
                f"is {held_out}: some must be left to train on and some to evaluate on."
            )
        val += own[:held_out]
        train += own[held_out:]
    return sorted(train), sorted(val)


def _training_classes(folder: pathlib.Path, left_out: _LeftOut) -> dict[str, list[pathlib.Path]]:
    """Two classes at least, with an image at least of each."""
    classes = _classes(folder, left_out)
    if len(classes) < 2:
        raise FolderError(
            f"{folder} has {len(classes)} directories of classes; a data set has two at least."
        )
    for name, files in classes.items():
        if not files:
            raise FolderError(f"{folder / name} has no images ({', '.join(EXTENSIONS)}).")
    return classes


def _classes(folder: pathlib.Path, left_out: _LeftOut) -> dict[str, list[pathlib.Path]]:
    """The images of each class directory, both sorted."""
    _, directories, files = next(os.walk(folder, onerror=_refuse))
    for name in files:
        left_out[_reason(name) or _LOOSE].append(folder / name)
    names = _visible(folder, directories, left_out)
    return {name: sorted(_images(folder / name, left_out)) for name in names}


def _images(top: pathlib.Path, left_out: _LeftOut) -> Iterator[pathlib.Path]:
    """Those below a class directory. No directory is read twice, so that links may lead back."""
    # A link to a directory above would put the images of all classes into this one.
    seen = {_identity(parent) for parent in top.resolve().parents}
    waiting = [top]
    while waiting:  # links after the directories themselves, whose images keep their paths so
        start = waiting.pop(0)
        for place, directories, files in os.walk(start, onerror=_refuse):
            here = pathlib.Path(place)
            identity = _identity(here)
            if identity in seen:
                left_out[_AGAIN].append(here)
                directories.clear()
                continue
            seen.add(identity)
            directories[:] = _visible(here, directories, left_out)
            waiting += [here / name for name in directories if (here / name).is_symlink()]
            for name in files:
                if reason := _reason(name):
                    left_out[reason].append(here / name)
                else:
                    yield here / name


def _visible(here: pathlib.Path, directories: Sequence[str], left_out: _LeftOut) -> list[str]:
    """The names of directories that are not hidden, sorted."""
    for name in filter(_is_hidden, directories):
        left_out[_HIDDEN].append(here / name)
    return sorted(name for name in directories if not _is_hidden(name))


def _identity(path: pathlib.Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM


def _reason(name: str) -> str | None:
    """Why a file is left out; None: it is an image."""
    if _is_hidden(name):
        return _HIDDEN
    return None if name.lower().endswith(EXTENSIONS) else _NO_IMAGE


def _refuse(error: OSError) -> NoReturn:
    """Instead of going on without a directory."""
    raise FolderError(f"{error.filename} cannot be read: {error.strerror}.") from None


def _summary(folder: pathlib.Path, left_out: _LeftOut) -> str:
    """A line about all that is left out."""
    parts = [
        f"{len(paths):,} {reason} (such as {printable(min(paths).relative_to(folder))})"
        for reason, paths in left_out.items()
    ]
    return f"Files or directories left out of {printable(folder)}: {'; '.join(parts)}."


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
        """What a person finds an example by: its file, as `printable` gives it."""
        return printable(self.files[index])


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
