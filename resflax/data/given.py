"""Images that the caller has, as arrays or as objects with len and access at random.

What may be given (`Given`):

- a resflax.data.sources.Dataset, taken as it is;
- {'train_images': ..., 'train_labels': ..., 'test_images': ..., 'test_labels': ...}: images are an
  array uint8 [N, H, W, C] or [N, H, W], or an object whose [i] is an image; labels are [N];
- {'train': ..., 'test': ...}, whose [i] is (image, label) or {'image': image, 'label': label}, or
  splits of Hugging Face's `datasets`, in a DatasetDict or not.

Either mapping may have

- 'label_names', by class;
- 'val_images' and 'val_labels', or 'val' or 'validation': images to choose the best state by, where
  config.data.val_share sets none aside;
- 'eval': further ones, by name, which a run evaluates at the end, {'NAME': object of images with
  labels} or {'NAME': {'images': ..., 'labels': ...}}.

An image that is read when it is asked for is an array uint8 of one shape; or a picture of Pillow's,
the bytes of a JPEG or PNG, or the path of one: these are decoded as the files of other sources are.
Objects are read by several threads at once.
"""

import copy
import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from PIL import Image

from resflax.data import arrays, decoding, folder, sources
from resflax.data.bad import UnreadableImage
from resflax.data.examples import ArraySource, Example
from resflax.errors import UserError

Given = sources.Dataset | Mapping[str, Any]

# Images that are looked at to tell whether all are grey.
_LOOKED_AT = 16

_PARTS = ("train", "test")
_RIGHT = (
    "right would be train_images, train_labels, test_images, test_labels, or train and test "
    "(objects of images with labels), and perhaps label_names, eval, and the same of val"
)


class GivenError(UserError):
    """What is given is no data set; the message says which part and why."""


def described(config: ml_collections.ConfigDict, dataset: object) -> ml_collections.ConfigDict:
    """The config of a run; a copy whose source is 'given', if a data set is, or made."""
    if dataset is None or config.data.source == "given":
        return config
    config = copy.deepcopy(config)
    config.data.source = "given"
    return config


def load(
    config: ml_collections.ConfigDict,
    dataset: Given | None,
    report: Callable[[str], None] | None = None,
) -> sources.Dataset:
    """The data set that is given, or, if none is, the one that `config.data` names.

    Args:
      config: `config.data`, by which images are decoded.
      dataset: see this module.
      report: see sources.load.

    Raises:
      UserError: if it is none.
    """
    told = {} if report is None else {"report": report}
    if isinstance(dataset, sources.Dataset):
        _require_whole(config)
        return _checked(dataset)
    return sources.load(config, raw=None if dataset is None else raw(dataset), **told)


def raw(given: Mapping[str, Any]) -> sources.Raw:
    """What sources.load makes a Dataset of.

    Raises:
      UserError: if it is no data set.
    """
    if not isinstance(given, Mapping):
        raise GivenError(f"dataset is of type {type(given).__name__}; {_RIGHT}.")
    found = {"val" if key == "validation" else key: value for key, value in given.items()}
    names = _label_names(found.pop("label_names", None))
    further = _further(found.pop("eval", {}))
    parts: dict[str, _Part] = {}
    for part, keys in _keys(found).items():
        at = [f"dataset[{key!r}]" for key in keys]
        parts[part], names = _part([found[key] for key in keys], at, names)
    for name, values in further.items():
        at = [f"dataset['eval'][{name!r}]{key}" for key in ("['images']", "['labels']")]
        own = at if len(values) == 2 else [f"dataset['eval'][{name!r}]"]
        parts[f"eval_{name}"], names = _part(values, own, names)
    return _together(parts, names)


def _keys(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each part is called in a mapping: one key, or one of images and one of labels."""
    kinds = ("",) if found.keys() & {*_PARTS} else ("_images", "_labels")
    keys = {part: [f"{part}{kind}" for kind in kinds] for part in (*_PARTS, "val")}
    if not found.keys() & {*keys["val"]}:
        del keys["val"]
    known = list(itertools.chain(*keys.values()))
    if missing := [key for key in known if key not in found]:
        there = _listed(found) or "no images"
        raise GivenError(f"dataset has {there}, and lacks {', '.join(missing)}; {_RIGHT}.")
    if extra := found.keys() - {*known}:
        raise GivenError(f"dataset has {_listed(extra)}, which is of no use; {_RIGHT}.")
    return keys


def _further(given: Any) -> dict[str, list[Any]]:
    """Named images to evaluate: an object of images with labels, or images and labels."""
    right = "right would be {NAME: object of images with labels}, or {NAME: {'images', 'labels'}}"
    if not isinstance(given, Mapping):
        raise GivenError(f"dataset['eval'] is of type {type(given).__name__}; {right}.")
    found = {}
    for name, part in given.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise GivenError(f"dataset['eval'] has the name {name!r}; letters and digits make one.")
        found[name] = [part]
        if isinstance(part, Mapping):
            if part.keys() != {"images", "labels"}:
                raise GivenError(f"dataset['eval'][{name!r}] has {_listed(part)}; {right}.")
            found[name] = [part["images"], part["labels"]]
    return found


@dataclasses.dataclass(frozen=True)
class Items:
    """Examples of the caller's, read one by one: see examples.EncodedExamples.

    Attributes:
      read: gives the image and the label at a place.
      count: of them.
      where: what a person finds them by.
      labels: int32 [N]; None: nobody knows them without reading the images.
      image_shape: (H, W, C) of arrays; None: the images are Pillow's, or files.
      num_classes: above all labels; None: as many as there are.
    """

    read: Callable[[int], tuple[Any, Any]]
    count: int
    where: str
    labels: np.ndarray | None
    image_shape: tuple[int, ...] | None
    num_classes: int | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        """Raises UnreadableImage if its file is gone, UserError if it is no example."""
        image, label = self.read(index)
        if self.labels is not None:
            label = self.labels[index]
        return {"image": self._image(image, index), "label": self.checked_label(label, index)}

    def name(self, index: int) -> str:
        """What a person finds an example by: its place."""
        return f"{self.where}[{index}]"

    def checked_label(self, label: Any, index: int) -> np.int32:
        """The label of an example; raises UserError if it is no class."""
        array = np.asarray(label)
        if array.ndim or array.dtype.kind not in "iu":
            raise GivenError(
                f"{self.name(index)} has the label {label!r}; right would be an integer."
            )
        most = np.iinfo(np.int32).max if self.num_classes is None else self.num_classes - 1
        if not 0 <= array <= most:
            raise GivenError(
                f"{self.name(index)} has the label {label}; right would be 0 to {most:,}."
            )
        return np.int32(array)

    def _image(self, image: Any, index: int) -> Any:
        if isinstance(image, str | os.PathLike):
            image = folder.read(os.fspath(image))
        shape = _shape(image, self.name(index))
        if shape != self.image_shape:
            ours, found = (
                "a picture" if s is None else f"an array {list(s)}"
                for s in (self.image_shape, shape)
            )
            raise GivenError(f"{self.name(index)} is {found}, and the first one is {ours}.")
        return image if shape is None else np.asarray(image).reshape(shape)


class _Part(NamedTuple):
    """Examples, and what a person finds their images and their labels by."""

    source: ArraySource | Items
    images: str
    labels: str


def _part(
    found: Sequence[Any], at: Sequence[str], names: tuple[str, ...] | None
) -> tuple[_Part, tuple[str, ...] | None]:
    """Examples, of one object or of images and labels; and the names of the classes."""
    if len(found) == 2:
        return _Part(_of_two(*found, *at), *at), names
    source, names = _of_items(found[0], at[0], names)
    return _Part(source, at[0], at[0]), names


def _of_two(images: Any, labels: Any, images_at: str, labels_at: str) -> ArraySource | Items:
    """The examples of images and labels that stand apart."""
    try:
        found = np.asarray(labels)
    except ValueError:  # of unequal lengths
        raise GivenError(f"{labels_at} is no array; labels must be integers, [N].") from None
    checked = arrays.checked_labels(found, labels_at)
    if hasattr(images, "__dlpack__"):  # an array in memory, of whatever library
        source = ArraySource(arrays.checked_images(np.asarray(images), images_at), checked)
        arrays.check_lengths(source.images, checked, labels_at)
        return source
    _require_access(images, images_at)
    arrays.check_lengths(images, checked, labels_at)
    shape = _shape(images[0], f"{images_at}[0]")
    return Items(lambda index: (images[index], 0), len(images), images_at, checked, shape)


def _of_items(
    items: Any, where: str, names: tuple[str, ...] | None
) -> tuple[Items, tuple[str, ...] | None]:
    """The examples of an object whose items are images with labels; and the names of the classes.

    Unless somebody says how many classes there are, every item is read once, for its label.
    """
    _require_access(items, where)
    labels = None
    if hasattr(items, "cast_column"):  # of Hugging Face
        read, labels, own = _hugging_face(items, where)
        names = names or own
    else:

        def read(index: int) -> tuple[Any, Any]:
            return _pair(items[index], f"{where}[{index}]")

    count = len(names) if names else None
    shape = _shape(read(0)[0], f"{where}[0]")
    found = Items(read, len(items), where, labels, shape, count)
    if labels is None and names is None:
        labels = np.array([found.checked_label(read(i)[1], i) for i in range(len(items))], np.int32)
        found = dataclasses.replace(found, labels=labels)
    return found, names


def _pair(item: Any, where: str) -> tuple[Any, Any]:
    """The image and the label of an item."""
    if isinstance(item, Mapping) and {"image", "label"} <= item.keys():
        return item["image"], item["label"]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    kind = f"has {_listed(item)}" if isinstance(item, Mapping) else f"is a {type(item).__name__}"
    raise GivenError(f"{where} {kind}; right would be (image, label) or {{'image', 'label'}}.")


def _hugging_face(
    split: Any, where: str
) -> tuple[Callable[[int], tuple[Any, Any]], np.ndarray, tuple[str, ...] | None]:
    """How a split of `datasets` is read, its labels, and the names of the classes."""
    image = _column(split, ("Image", "Array2D", "Array3D"), "image", where)
    label = _column(split, ("ClassLabel", "Value"), "label", where)
    split = split.with_format(None).select_columns([image, label])
    feature = split.features[image]
    is_array = type(feature).__name__ != "Image"
    if not is_array:  # its bytes, which are decoded as those of files are
        split = split.cast_column(image, type(feature)(decode=False))
    elif feature.dtype != "uint8":
        raise GivenError(f"{where} has the column {image!r} of {feature.dtype}, not uint8.")
    labels = arrays.checked_labels(np.asarray(split[label]), f"{where}[{label!r}]")

    def read(index: int) -> tuple[Any, Any]:
        found = split[index][image]
        if found is None:
            raise UnreadableImage("it has no image")
        if is_array:
            return np.asarray(found, np.uint8), 0
        return found["bytes"] if found["bytes"] is not None else found["path"], 0

    names = getattr(split.features[label], "names", None)
    return read, labels, tuple(names) if names else None


def _column(split: Any, kinds: Sequence[str], usual: str, where: str) -> str:
    """The column of a split that has one of some features, or has its usual name among several."""
    columns = {name: type(feature).__name__ for name, feature in split.features.items()}
    for kind in kinds:
        found = [name for name, own in columns.items() if own == kind]
        if usual in found or (len(found) == 1 and kind != "Value"):
            return usual if usual in found else found[0]
    listed = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
    raise GivenError(
        f"{where} has the columns {listed}, and no {usual!r} among those of {' or '.join(kinds)}: "
        f"rename_column(..., {usual!r}) says which is meant."
    )


def _together(parts: Mapping[str, _Part], names: tuple[str, ...] | None) -> sources.Raw:
    """The parts as one data set, once they have been seen to go together."""
    train = parts["train"]
    shape, labels = train.source.image_shape, train.source.labels
    for part in [part for part in parts.values() if part is not train]:
        found = part.source.image_shape
        if (shape is None) != (found is None):
            kinds = ["pictures" if s is None else "arrays" for s in (shape, found)]
            raise GivenError(f"{part.images} has {kinds[1]}, and those to train on are {kinds[0]}.")
        if shape is not None and found is not None:
            arrays.check_shapes(shape, found, part.images)
        own = part.source.labels
        if labels is not None and own is not None:
            ours, theirs = (labels, train.labels), (own, part.labels)
            names = arrays.checked_classes(ours, theirs, names, "dataset")
    assert names is not None  # else all labels have been read
    return sources.Raw(
        train.source,
        parts["test"].source,
        names,
        channels=1 if isinstance(train.source, Items) and _is_grey(train.source) else 3,
        image_shape=shape,
        val=parts["val"].source if "val" in parts else None,
        further={
            name.removeprefix("eval_"): part.source
            for name, part in parts.items()
            if name.startswith("eval_")
        },
    )


def _is_grey(pictures: Items) -> bool:
    """Whether none of some images has colours."""
    if pictures.image_shape:
        return False
    looked_at = min(_LOOKED_AT, len(pictures))
    readable = False
    for i in range(looked_at):
        try:
            if not decoding.is_grey(pictures[i * len(pictures) // looked_at]["image"]):
                return False
            readable = True
        except UnreadableImage:
            continue
    return readable


def _shape(image: Any, where: str) -> tuple[int, ...] | None:
    """(H, W, C) of an array; None: it is one of Pillow's images, or a file."""
    if isinstance(image, bytes | str | os.PathLike | Image.Image):
        return None
    array = np.asarray(image)
    # As one of a batch, so that what is wrong is said once.
    return arrays.checked_images(array[None], where).shape[1:]


def _require_access(found: Any, where: str) -> None:
    """Raises GivenError unless an object has a length, not 0, and access at random."""
    if not (hasattr(found, "__len__") and hasattr(found, "__getitem__")) or isinstance(found, str):
        raise GivenError(
            f"{where} is of type {type(found).__name__}; right would be an array, or an object "
            "with len and access at random, [i]: no iterator, and no stream."
        )
    if not len(found):
        raise GivenError(f"{where} is empty: there are no images in it.")


def _label_names(names: Any) -> tuple[str, ...] | None:
    if names is None:
        return None
    found = tuple(names) if not isinstance(names, str) else ()
    if len(found) < 2 or not all(isinstance(name, str) for name in found):
        raise GivenError(
            f"dataset['label_names'] is {names!r}; right would be a text for each class, of two at "
            "least."
        )
    return tuple(map(str, found))


def _require_whole(config: ml_collections.ConfigDict) -> None:
    """Raises GivenError if a Dataset, whose shares whoever made it has taken, is to be divided."""
    for field, none in (("val_share", 0.0), ("train_share", 1.0), ("label_noise", 0.0)):
        if config[field] != none:
            raise GivenError(
                f"config.data.{field} {config[field]:g}: a Dataset is taken as it is; give arrays "
                f"or objects of examples, or set the field to {none:g}."
            )


def _checked(dataset: sources.Dataset) -> sources.Dataset:
    """A Dataset, once it has been seen to be sound as far as that is cheap."""
    parts = {"train": dataset.train, "test": dataset.test}
    parts |= {} if dataset.val is None else {"val": dataset.val}
    for part, source in parts.items():
        if not len(source):
            raise GivenError(f"dataset.{part} is empty: there are no images in it.")
        if isinstance(source, ArraySource):
            arrays.checked_images(source.images, f"dataset.{part}.images")
            labels = arrays.checked_labels(source.labels, f"dataset.{part}.labels")
            arrays.check_lengths(source.images, labels, f"dataset.{part}.labels")
            most = dataset.description.num_classes - 1
            if labels.max() > most:
                raise GivenError(
                    f"dataset.{part}.labels has the label {labels.max()}; by its description they "
                    f"are 0 to {most}."
                )
    return dataset


def _listed(keys: Any) -> str:
    return ", ".join(sorted(map(str, keys)))
