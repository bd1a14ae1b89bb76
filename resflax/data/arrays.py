"""Images that are saved as arrays: NumPy's files, or the IDX files of MNIST and its family."""

import contextlib
import dataclasses
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence, Sized

import numpy as np

from resflax.data import idx, location
from resflax.errors import UserError
from resflax.process import arguments

# The arrays of a data set, and what Keras' data sets call them.
_NAMES = {
    "train_images": "x_train",
    "train_labels": "y_train",
    "test_images": "x_test",
    "test_labels": "y_test",
}

# The same in the files of MNIST, whose archives end in .gz; some unpack them to names with a dot.
_IDX_NAMES = {
    "train_images": ("train-images-idx3-ubyte", "train-images.idx3-ubyte"),
    "train_labels": ("train-labels-idx1-ubyte", "train-labels.idx1-ubyte"),
    "test_images": ("t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte"),
    "test_labels": ("t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"),
}

LABEL_NAMES = "label_names.txt"

_FORMS = (
    "an .npz file with train_images, train_labels, test_images and test_labels, a directory with "
    "these as .npy files, or a directory with the four IDX files of MNIST's family"
)


class ArraysError(UserError):
    """What was found is no data set; the message says which file and why."""


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A data set in arrays.

    Attributes:
      train_images: uint8 [N, H, W, C]; of a directory of .npy files, mapped and not yet read.
      train_labels: int32 [N].
      test_images: likewise, with the same H, W and C.
      test_labels: likewise.
      label_names: by class.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    label_names: tuple[str, ...]


# An array, and what a person finds it by.
_Found = tuple[np.ndarray, str]


def load(path: str | pathlib.Path) -> Arrays:
    """Opens a data set; nothing in it is unpickled.

    Args:
      path: an .npz file with train_images, train_labels, test_images and test_labels, or Keras'
        x_train, y_train, x_test and y_test, and perhaps label_names; a directory with such .npy
        files, the names perhaps in label_names.txt, one a line; a directory with the four IDX files
        of MNIST's family, gzipped or not; or, if there is no such path, the name of a data set that
        `python -m resflax.data prepare` made.

    Raises:
      ArraysError: if there is none, or it cannot be trained on.
    """
    where = _locate(path)
    if where.is_dir():
        found, names = _read_directory(where)
    else:
        found, names = _read_npz(where)
    images = {split: checked_images(*found[f"{split}_images"]) for split in ("train", "test")}
    labels = {split: checked_labels(*found[f"{split}_labels"]) for split in ("train", "test")}
    for split in ("train", "test"):
        check_lengths(images[split], labels[split], found[f"{split}_labels"][1])
    shapes = {split: images[split].shape[1:] for split in ("train", "test")}
    check_shapes(shapes["train"], shapes["test"], found["test_images"][1])
    train, test = ((labels[split], found[f"{split}_labels"][1]) for split in ("train", "test"))
    label_names = checked_classes(train, test, names, str(where))
    return Arrays(images["train"], labels["train"], images["test"], labels["test"], label_names)


def _locate(path: str | pathlib.Path) -> pathlib.Path:
    """The file or directory; a name that is no path is looked up among the prepared data sets."""
    text = str(path)
    looked: list[pathlib.Path] = []
    if text:
        looked.append(arguments.path(path))
        if pathlib.Path(text).name == text:
            looked.append(location.data_dir() / text)
    for candidate in looked:
        if candidate.is_dir() or candidate.is_file():
            return candidate
    places = " or ".join(str(candidate.absolute()) for candidate in looked)
    raise ArraysError(
        f"no data set {text!r}{f': there is no {places}' if places else ''}. Right would be "
        f"{_FORMS}, or the name of one that python -m resflax.data prepare made."
    )


def _read_npz(path: pathlib.Path) -> tuple[dict[str, _Found], tuple[str, ...] | None]:
    if not zipfile.is_zipfile(path):
        raise ArraysError(f"{path} is no .npz file; a data set is {_FORMS}.")
    with _opened(path), np.load(path, allow_pickle=False) as archive:
        keys = _keys(archive.files, str(path))
        found = {}
        for name, key in keys.items():
            label = f"{path}: {key}"
            with _opened(label):
                found[name] = archive[key], label
        names = None
        if "label_names" in archive.files:
            with _opened(f"{path}: label_names"):
                names = _names_in_array(archive["label_names"], f"{path}: label_names")
    return found, names


def _read_directory(path: pathlib.Path) -> tuple[dict[str, _Found], tuple[str, ...] | None]:
    files = {file.name: file for file in path.iterdir()}
    names = None
    if LABEL_NAMES in files:
        names = _names_in_text(files[LABEL_NAMES])
    elif "label_names.npy" in files:
        file = files["label_names.npy"]
        with _opened(file):
            names = _names_in_array(np.load(file, allow_pickle=False), str(file))
    in_idx = {
        name: [
            files[stem + ending]
            for stem in stems
            for ending in ("", ".gz")
            if stem + ending in files
        ]
        for name, stems in _IDX_NAMES.items()
    }
    arrays = [file.stem for file in files.values() if file.suffix == ".npy"]
    if not arrays and any(in_idx.values()):
        missing = [_IDX_NAMES[name][0] for name, candidates in in_idx.items() if not candidates]
        if missing:
            raise ArraysError(f"{path} lacks {', '.join(missing)} (or .gz).")
        found = {}
        for name, candidates in in_idx.items():
            try:
                found[name] = idx.read(candidates[0]), str(candidates[0])
            except idx.IdxError as error:
                raise ArraysError(str(error)) from None
        return found, names
    if not arrays:
        raise ArraysError(f"{path} has no .npy and no IDX files; a data set is {_FORMS}.")
    found = {}
    for name, key in _keys(arrays, str(path)).items():
        file = files[f"{key}.npy"]
        with _opened(file):
            found[name] = np.load(file, mmap_mode="r", allow_pickle=False), str(file)
    return found, names


@contextlib.contextmanager
def _opened(what: str | pathlib.Path) -> Iterator[None]:
    """Says what cannot be read, in place of NumPy's several kinds of error."""
    try:
        yield
    except ArraysError:
        raise
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "allow_pickle" in reason or "Python objects" in reason:
            reason = (
                "it holds Python objects (a pickle), which may run code, or is no array at all; "
                "save numbers, in an array of dtype uint8 or of integers"
            )
        raise ArraysError(f"{what} cannot be read: {reason.rstrip('.')}.") from None


def _keys(present: list[str], where: str) -> dict[str, str]:
    """What each array is called there: by our names, or by Keras'."""
    for keys in ({name: name for name in _NAMES}, _NAMES):
        if set(keys.values()) <= set(present):
            return keys
    raise ArraysError(
        f"{where} has {', '.join(sorted(present)) or 'no arrays'}; a data set has "
        f"{', '.join(_NAMES)} (or {', '.join(_NAMES.values())})."
    )


def _names_in_array(names: np.ndarray, where: str) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind not in "US":
        raise ArraysError(f"{where} is {_kind(names)}; right would be a list of strings.")
    return tuple(n.decode() if isinstance(n, bytes) else str(n) for n in names.tolist())


def _names_in_text(file: pathlib.Path) -> tuple[str, ...]:
    try:
        return tuple(file.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ArraysError(f"{file} cannot be read as text: {error}.") from None


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} [{', '.join(map(str, array.shape))}]"


def checked_images(images: np.ndarray, where: str) -> np.ndarray:
    """Images as uint8 [N, H, W, C].

    Args:
      images: as they were found.
      where: what a person finds them by.

    Raises:
      ArraysError: if they are of another type or shape, or none.
    """
    if images.dtype != np.uint8:
        raise ArraysError(
            f"{where} is {images.dtype}; images must be uint8, 0 to 255{_advice(images)}."
        )
    if images.ndim not in (3, 4):
        raise ArraysError(f"{where} is {_kind(images)}; images must be [N, H, W] or [N, H, W, C].")
    if not images.size:
        raise ArraysError(f"{where} is {_kind(images)}: there are no images in it.")
    if images.ndim == 3:
        return images[..., None]
    _, height, width, channels = images.shape
    if height in (1, 3) and min(width, channels) > 4:
        raise ArraysError(
            f"{where} is {_kind(images)}, which looks like [N, C, H, W]; images must be "
            "[N, H, W, C]: images.transpose(0, 2, 3, 1)."
        )
    return images


def _advice(images: np.ndarray) -> str:
    """How images of another type could be made uint8."""
    if images.dtype.kind not in "fiu" or not images.size:
        return ""
    if not np.isfinite(images).all():
        return ", and there are NaN or infinite numbers in these: correct them first"
    low, high = images.min(), images.max()
    if images.dtype.kind == "f" and low >= 0 and high <= 1:
        return ": np.round(images * 255).astype(np.uint8), as these go from 0 to 1"
    if low >= 0 and high <= 255:
        return ": np.round(images).astype(np.uint8)"
    return f", and these go from {low:g} to {high:g}: bring them there first"


def checked_labels(labels: np.ndarray, where: str) -> np.ndarray:
    """Labels as int32 [N].

    Args:
      labels: as they were found.
      where: what a person finds them by.

    Raises:
      ArraysError: if they are no classes, from 0.
    """
    if labels.dtype.kind not in "iu":
        raise ArraysError(f"{where} is {labels.dtype}; labels must be integers, from 0.")
    shape = labels.shape
    if labels.ndim == 2 and shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        hint = "; of one-hot rows, labels.argmax(1)" if labels.ndim == 2 else ""
        raise ArraysError(f"{where} is {_kind(labels)}; labels must be [N] or [N, 1]{hint}.")
    # Before the conversion, which would wrap what does not fit.
    if labels.size and not 0 <= labels.min() <= labels.max() <= np.iinfo(np.int32).max:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise ArraysError(f"{where} has the label {wrong}; labels must be classes, from 0.")
    return labels.astype(np.int32)


def check_lengths(images: Sized, labels: Sized, where: str) -> None:
    """Raises ArraysError unless there are as many labels, which are at `where`, as images."""
    if len(images) != len(labels):
        raise ArraysError(f"{where} has {len(labels):,} labels for {len(images):,} images.")


def check_shapes(train: Sequence[int], found: Sequence[int], where: str) -> None:
    """Raises ArraysError unless the images at `where` have the shape of those to train on."""
    ours, theirs = (" x ".join(map(str, shape)) for shape in (train, found))
    if ours != theirs:
        raise ArraysError(f"{where} has images of {theirs}, and those to train on are of {ours}.")


def checked_classes(
    train: _Found, test: _Found, names: tuple[str, ...] | None, where: str
) -> tuple[str, ...]:
    """The names of the classes, once every label has been seen to be one that can be learnt.

    Args:
      train: labels, and what a person finds them by.
      test: likewise.
      names: by class; None: nobody names them, and they are called by their numbers.
      where: what a person finds the data set by.

    Raises:
      ArraysError: if there are fewer than two classes to train on, gaps between them, classes that
        are not trained on, or classes without a name.
    """
    classes = np.unique(train[0])
    if len(classes) < 2:
        raise ArraysError(
            f"{train[1]} has the label {classes[0]} alone; a data set has two classes at least."
        )
    extra = np.setdiff1d(test[0], classes)
    if len(extra):
        raise ArraysError(f"{test[1]} has labels that the training set has not: {_some(extra)}.")
    top = int(classes[-1])
    if names is None:
        missing = np.setdiff1d(np.arange(min(top, 2 * len(classes))), classes)
        if len(missing):
            raise ArraysError(
                f"{train[1]} has labels up to {top} and none of {_some(missing)}: number the "
                "classes from 0, or name all of them in label_names."
            )
        return tuple(map(str, range(top + 1)))
    if top >= len(names):
        raise ArraysError(
            f"{train[1]} has the label {top}, and there are names for 0 to {len(names) - 1}: "
            f"{where} needs a label_names for every class."
        )
    return names


def _some(labels: np.ndarray) -> str:
    return ", ".join(map(str, labels[:5].tolist())) + (", ..." if len(labels) > 5 else "")
