"""Image-classification data sets that TensorFlow Datasets (TFDS) prepared; nothing is downloaded.

A prepared data set is a directory, DATA_DIR/NAME[/CONFIG]/VERSION. Where its files allow access at
random (array_record), they are read when an image is asked for, without TensorFlow. TFRecord files,
TFDS' own choice, are read into memory, by TensorFlow.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
from typing import Any, Protocol

import numpy as np

from resflax.errors import UserError
from resflax.process import arguments

_INFO, _FEATURES = "dataset_info.json", "features.json"

# The formats of TFDS that can be read at random, the better one first.
_RANDOM_ACCESS = ("array_record", "parquet")

# Features of TFDS' data sets that say which file an image was.
_FILE_NAMES = ("file_name", "image/filename")

# Of TFRecord files, which are kept in memory.
_MOST_BYTES = 8 << 30


class TfdsError(UserError):
    """The data set is not there or cannot be used; the message says where and what would help."""


@dataclasses.dataclass(frozen=True)
class Defaults:
    """How a data set is commonly used.

    Attributes:
      train_split: in TFDS' notation.
      test_split: likewise; of ImageNet it is the validation set, whose labels alone are public.
      image_size: side of the images to train on, pixels.
      mean: of each channel, on a scale of 0 to 1.
      std: standard deviation, likewise.
    """

    train_split: str
    test_split: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


# torchvision's and timm's.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _of_255(*values: float) -> tuple[float, ...]:
    return tuple(value / 255 for value in values)


# By TFDS' names. mean and std are those of the code whose results are compared with.
DEFAULTS = {
    "imagenet2012": Defaults("train", "validation", 224, _IMAGENET_MEAN, _IMAGENET_STD),
    # The training images' own, rounded, as public code for Wide ResNet and its successors has them.
    "cifar10": Defaults(
        "train", "test", 32, _of_255(125.3, 123.0, 113.9), _of_255(63.0, 62.1, 66.7)
    ),
    "cifar100": Defaults(
        "train", "test", 32, _of_255(129.3, 124.1, 112.4), _of_255(68.2, 65.4, 70.4)
    ),
    # zhunzhong07/Random-Erasing, fashionmnist.py: they are MNIST's.
    "fashion_mnist": Defaults("train", "test", 28, (0.1307,), (0.3081,)),
    # A part of ImageNet.
    "imagenette": Defaults("train", "validation", 128, _IMAGENET_MEAN, _IMAGENET_STD),
    # It has one split. ImageNet's mean, as for networks that were trained there.
    "cats_vs_dogs": Defaults("train[:80%]", "train[80%:]", 224, _IMAGENET_MEAN, _IMAGENET_STD),
}


def defaults(name: str) -> Defaults | None:
    """Those of a data set, NAME[/CONFIG][:VERSION], if it is a common one."""
    return DEFAULTS.get(re.split("[/:]", name)[0])


class Records(Protocol):
    """Examples as TFDS gives them out, read at random and by several threads at once."""

    def __len__(self) -> int:
        """Their number."""

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """Features by their names."""


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """Examples of a split.

    `source[i]` is `{'image': bytes or uint8 [H, W, C], 'label': int32 []}`, read when it is asked
    for, by any number of threads.

    Attributes:
      records: the examples with TFDS' features.
      split: in TFDS' notation.
      where: the directory of the data set.
    """

    records: Records
    split: str
    where: pathlib.Path

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        label = np.int32(record["label"])
        if label < 0:
            raise TfdsError(
                f"{self.name(index)} has the label {label}: this split was published without "
                "labels; choose another one."
            )
        return {"image": record["image"], "label": label}

    def name(self, index: int) -> str:
        """What a person finds an example by: its place, and its file where TFDS has kept that."""
        record = self.records[index]
        files = [_text(record[feature]) for feature in _FILE_NAMES if feature in record]
        return f"{self.where} {self.split}[{index}]" + "".join(f" ({file})" for file in files)


@dataclasses.dataclass(frozen=True)
class TfdsDataset:
    """A prepared data set.

    Attributes:
      train: the examples to train on.
      test: those to evaluate on.
      label_names: by class.
      image_shape: (H, W, C); None where it varies.
      encoded: whether images are bytes of JPEGs or PNGs; else they are uint8 [H, W, C].
      where: its directory.
      val: those to choose the best state by; None: none are named.
    """

    train: TfdsSource
    test: TfdsSource
    label_names: tuple[str, ...]
    image_shape: tuple[int | None, ...]
    encoded: bool
    where: pathlib.Path
    val: TfdsSource | None = None


def open_dataset(
    name: str,
    *,
    data_dir: str | pathlib.Path = "",
    train_split: str = "",
    test_split: str = "",
    val_split: str = "",
) -> TfdsDataset:
    """Opens a prepared data set.

    Args:
      name: NAME[/CONFIG][:VERSION], as TFDS writes it; without a version, the newest there.
      data_dir: of TFDS; '': $TFDS_DATA_DIR, or else ~/tensorflow_datasets.
      train_split: to train on, in TFDS' notation, as 'train[:90%]'; '': that of DEFAULTS,
        or 'train'.
      test_split: to evaluate on, likewise, or 'test'.
      val_split: to choose the best state by, with none of the images to train on; '': none.

    Raises:
      TfdsError: if it is not there, holds no labelled images, lacks a split or a file, or has the
        format TFRecord and TensorFlow is not installed or the data set too large; or if images to
        train on are to be validated on too.
    """
    where = find(name, data_dir)
    random_access = [kind for kind in _RANDOM_ACCESS if kind in formats(where)]
    if not random_access:
        _check_tensorflow(where)
    # Imported here: it takes seconds, and a data set that is not there needs none of it.
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(where)
        for kind in random_access[:1]:
            builder.info.set_file_format(kind, override=True, override_if_initialized=True)
        features = dict(builder.info.features or {})
    # The library raises what its readers of JSON, protocol buffers and features meet.
    except Exception as error:
        raise TfdsError(f"{where} cannot be read: {_line(error)}.") from error
    label_names = _label_names(features, where)
    encoded = _check_image(features, where)
    usual = defaults(name)
    train_split = train_split or (usual.train_split if usual else "train")
    test_split = test_split or (usual.test_split if usual else "test")
    # An image that is not wanted, as a mask, is not decoded either.
    decoders = {
        feature: tfds.decode.SkipDecoding()
        for feature, kind in features.items()
        if isinstance(kind, tfds.features.Image)
    }
    read = _at_random if random_access else _in_memory
    splits = {"train": train_split, "test": test_split}
    splits |= {"val": val_split} if val_split else {}
    for part, split in splits.items():
        _check_split(builder, f"{part}_split", split, where)
    if val_split:
        _check_apart(builder, train_split, val_split, where)
    return TfdsDataset(
        **{p: TfdsSource(read(builder, s, decoders, where), s, where) for p, s in splits.items()},
        label_names=label_names,
        image_shape=features["image"].shape,
        encoded=encoded,
        where=where,
    )


def root(data_dir: str | pathlib.Path | None = None) -> pathlib.Path:
    """Where TFDS keeps data sets: here, or at $TFDS_DATA_DIR, or at ~/tensorflow_datasets."""
    given = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return arguments.path(given)


def find(name: str, data_dir: str | pathlib.Path | None = None) -> pathlib.Path:
    """The directory of a prepared data set, in milliseconds, by looking alone.

    Args:
      name: NAME[/CONFIG][:VERSION].
      data_dir: see `root`.

    Raises:
      TfdsError: if it is not there, or there in several configurations and `name` says none.
    """
    parts = re.fullmatch(r"(\w+)(?:/([\w.-]+))?(?::(\d+\.\d+\.\d+))?", name)
    if not parts:
        raise TfdsError(
            f"{name!r} is no name of a TFDS data set; right would be NAME, NAME/CONFIG or "
            "NAME:VERSION, as 'cifar10', 'imagenette/320px-v2' or 'cifar10:3.0.2'."
        )
    dataset, config, version = parts.groups()
    home = root(data_dir) / dataset
    place = home / config if config else home
    versions = _versions(place)
    if not versions and not config:
        configs = {path.name: _versions(path) for path in _directories(home)}
        there = sorted(name for name, versions in configs.items() if versions)
        if len(there) > 1:
            raise TfdsError(
                f"{home} has the configurations {', '.join(there)}: say which, as "
                f"'{dataset}/{there[0]}'."
            )
        if there:
            place, versions = home / there[0], configs[there[0]]
    if version:
        versions = {k: v for k, v in versions.items() if v.name == version}
        place /= version
    if not versions:
        raise TfdsError(
            f"no data set at {place}: python -m resflax.data prepare {name} makes it, and "
            "config.data.tfds.data_dir or $TFDS_DATA_DIR says where they are."
        )
    return versions[max(versions)]


def formats(where: pathlib.Path) -> set[str]:
    """The formats of a prepared data set's files, as TFDS calls them; of old ones, none is known.

    Raises:
      TfdsError: if its description cannot be read.
    """
    try:
        info = json.loads((where / _INFO).read_text())
        return {info.get("fileFormat"), *info.get("alternativeFileFormats", ())} - {None}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise TfdsError(f"{where / _INFO} cannot be read: {_line(error)}.") from None


def conversion(where: pathlib.Path) -> str:
    """The commands that add array_record files to a data set of another format."""
    # TFDS declares none of these packages, and its command imports them all.
    return (
        f"pip install 'resflax[tf]' apache-beam mlcroissant && tfds convert_format "
        f"--dataset_version_dir={where} --out_file_format=array_record"
    )


def _directories(path: pathlib.Path) -> list[pathlib.Path]:
    return [child for child in path.iterdir() if child.is_dir()] if path.is_dir() else []


def _versions(place: pathlib.Path) -> dict[tuple[int, ...], pathlib.Path]:
    """The whole data sets in a directory, by their versions."""
    return {
        tuple(map(int, path.name.split("."))): path
        for path in _directories(place)
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name)
        and all((path / file).is_file() for file in (_INFO, _FEATURES))
    }


def _check_tensorflow(where: pathlib.Path) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        raise TfdsError(
            f"{where} has TFRecord files, which TensorFlow reads: pip install 'resflax[tf]'. Once "
            f"converted, they are read without it: {conversion(where)}"
        )


def _check_image(features: dict[str, Any], where: pathlib.Path) -> bool:
    """Whether the images are encoded."""
    import tensorflow_datasets as tfds

    image = features["image"]
    encoded = isinstance(image, tfds.features.Image)
    if not (encoded or isinstance(image, tfds.features.Tensor)) or len(image.shape) != 3:
        raise TfdsError(
            f"{where}: the feature 'image' is {image!r}; right would be an Image, or a Tensor of "
            "rank 3."
        )
    if image.np_dtype != np.uint8:
        raise TfdsError(f"{where} has images of {np.dtype(image.np_dtype)}, not uint8.")
    return encoded


def _label_names(features: dict[str, Any], where: pathlib.Path) -> tuple[str, ...]:
    import tensorflow_datasets as tfds

    label = features.get("label")
    if "image" not in features or not isinstance(label, tfds.features.ClassLabel):
        kinds = ", ".join(
            f"{name} ({type(kind).__name__})" for name, kind in sorted(features.items())
        )
        raise TfdsError(
            f"{where} has the features {kinds}; for classification it needs 'image' and 'label' "
            "(ClassLabel)."
        )
    if (label.num_classes or 0) < 2:
        raise TfdsError(f"{where} has {label.num_classes or 0} classes; it takes two at least.")
    return tuple(label.names)


def _check_split(builder: Any, field: str, split: str, where: pathlib.Path) -> None:
    """That it is there, with its files."""
    there = ", ".join(builder.info.splits)
    try:
        info = builder.info.splits[split]
        count, files = info.num_examples, [pathlib.Path(path) for path in info.filepaths]
    # As above: of the split's grammar, of numbers beyond it, of names that it has not.
    except Exception:
        raise TfdsError(
            f"config.data.tfds.{field} {split!r} is no split of {where}, which has {there}; parts "
            "are written 'train[:90%]', sums 'train+test'."
        ) from None
    if not count:
        raise TfdsError(f"config.data.tfds.{field} {split!r} of {where} has no examples.")
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise TfdsError(
            f"{where} is not whole: {missing[0].name} is missing, one of {len(missing)} such files."
        )


def _check_apart(builder: Any, train_split: str, val_split: str, where: pathlib.Path) -> None:
    """That no image is both to train on and to validate on."""
    for file, start, end in _spans(builder, train_split):
        for other, first, last in _spans(builder, val_split):
            if file == other and start < last and first < end:
                raise TfdsError(
                    f"config.data.tfds.val_split {val_split!r} of {where} has images of "
                    f"train_split {train_split!r}; apart are such as 'train[90%:]' and "
                    "'train[:90%]'."
                )


def _spans(builder: Any, split: str) -> list[tuple[str, int, float]]:
    """The examples of each file that a split has: the first one, and the one after the last."""
    return [
        (part.filename, part.skip, part.skip + part.take if part.take >= 0 else math.inf)
        for part in builder.info.splits[split].file_instructions
    ]


def _at_random(builder: Any, split: str, decoders: dict[str, Any], where: pathlib.Path) -> Records:
    try:
        return builder.as_data_source(split, decoders=decoders)
    except ImportError as error:
        raise TfdsError(f"{where} needs the package {error.name}: pip install it.") from None


class _Records:
    """Examples in memory."""

    def __init__(self, images: list[bytes | np.ndarray], labels: list[int]):
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": self._labels[index]}


def _in_memory(builder: Any, split: str, decoders: dict[str, Any], where: pathlib.Path) -> Records:
    """The examples in the order of the files, the images still encoded."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    size = sum(os.path.getsize(file) for file in set(builder.info.splits[split].filepaths))
    if size > _MOST_BYTES:
        raise TfdsError(
            f"{where} has {size / 2**30:.1f} GiB of TFRecord files in {split!r}, more than the "
            f"{_MOST_BYTES / 2**30:g} GiB that are read into memory. Once converted, it is read "
            f"from the disk: {conversion(where)}"
        )
    # TensorFlow would take the memory that JAX needs; it may have done so before.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    wanted = ("image", "label")
    decoding = tfds.decode.PartialDecoding(
        dict.fromkeys(wanted, True), {k: v for k, v in decoders.items() if k in wanted}
    )
    examples = builder.as_dataset(
        split=split,
        shuffle_files=False,
        decoders=decoding,
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    )
    images: list[bytes | np.ndarray] = []
    labels: list[int] = []
    for example in tfds.as_numpy(examples):
        images.append(example["image"])
        labels.append(int(example["label"]))
    return _Records(images, labels)


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
