"""Data sets of the caller's own: arrays, objects that are read one by one, Hugging Face's."""

import io
import re

import jax
import numpy as np
import pytest
from PIL import Image
from plain import config as plain_config

import resflax
from resflax import config as config_lib
from resflax import evaluate, train
from resflax.analysis import subject
from resflax.data import folder, given, resident, sources
from resflax.data.examples import ArraySource, DecodedSource
from resflax.errors import UserError
from resflax.parts import Parts

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (64, 16, 16, 3), np.uint8)
LABELS = np.arange(64) % 4
ARRAYS = {
    "train_images": IMAGES,
    "train_labels": LABELS,
    "test_images": IMAGES[:10],
    "test_labels": LABELS[:10],
}


class Items:
    """Examples that are read one by one, and of which it is known which were."""

    def __init__(self, examples):
        self.examples, self.read = examples, []

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        self.read.append(index)
        return self.examples[index]


def items(count=64, make=lambda image: image):
    return Items(
        [(make(image), label) for image, label in zip(IMAGES[:count], LABELS, strict=False)]
    )


def data_config(**fields):
    config = config_lib.base().data
    config.update({"source": "given", "image_size": 16, **fields})
    return config


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def test_arrays_are_kept_as_they_are():
    dataset = given.load(data_config(), ARRAYS)
    assert isinstance(dataset.train, ArraySource)
    assert resident.wanted("auto", dataset.train)
    np.testing.assert_array_equal(dataset.train.images, IMAGES)
    np.testing.assert_array_equal(dataset.test.labels, LABELS[:10])
    assert dataset.description.name == "given"
    assert dataset.description.label_names == ("0", "1", "2", "3")
    grey = ARRAYS | {"train_images": IMAGES[..., 0], "test_images": IMAGES[:10, ..., 0]}
    dataset = given.load(data_config(), grey | {"label_names": list("abcd")})
    assert dataset.description.image_shape == (16, 16, 1)
    assert dataset.description.label_names == ("a", "b", "c", "d")


@pytest.mark.parametrize("form", ["apart", "items"])
def test_objects_are_read_one_by_one(form):
    if form == "items":
        part = items()
        found = {"train": part, "test": items(10), "label_names": list("abcd")}
    else:
        part = Items(IMAGES)
        found = ARRAYS | {"train_images": part, "test_images": Items(IMAGES[:10])}
    dataset = given.load(data_config(threads=3, mean=(0.5,) * 3, std=(0.2,) * 3), found)
    assert isinstance(dataset.train, DecodedSource)
    assert dataset.threads == 3
    assert set(part.read) == {0}  # the first, for its shape
    part.read.clear()
    batch = dataset.train.train_batch(np.array([5, 2]), np.array([0, 0]))
    assert part.read == [5, 2]
    assert all(type(index) is int for index in part.read)
    np.testing.assert_array_equal(batch["image"], IMAGES[[5, 2]])
    np.testing.assert_array_equal(batch["label"], LABELS[[5, 2]])
    with pytest.raises(ValueError, match="'device' is for images in memory"):
        resident.wanted("device", dataset.train)


def test_items_without_names_of_classes_are_read_for_their_labels():
    dataset = given.load(data_config(), {"train": items(), "test": items(10)})
    assert dataset.description.num_classes == 4


@pytest.mark.parametrize("crop", ["center", "resized", "scale"])
@pytest.mark.parametrize("kind", ["pillow", "bytes", "path"])
def test_pictures_are_decoded_as_files_are(tmp_path, crop, kind):
    images = RNG.integers(0, 256, (8, 40, 30, 3), np.uint8)
    for i, image in enumerate(images):
        (tmp_path / "abcd"[i % 4]).mkdir(exist_ok=True)
        (tmp_path / "abcd"[i % 4] / f"{i}.png").write_bytes(png(image))
    config = data_config(crop=crop, crop_shorter=(20, 40), eval_resize=20)
    config.folder.update(path=str(tmp_path), val_share=0.5)
    config.source = "folder"
    files = sources.load(config)
    paths = [sources.image_folder(config).train.files, sources.image_folder(config).test.files]
    make = {"pillow": Image.open, "bytes": folder.read, "path": str}[kind]
    parts = [
        [{"image": make(path), "label": "abcd".index(path.split("/")[-2])} for path in part]
        for part in paths
    ]
    config.source = "given"
    found = dict(zip(("train", "test"), parts, strict=True)) | {"label_names": list("abcd")}
    dataset = given.load(config, found)
    for method in ("train", "test"):
        source, other = getattr(dataset, method), getattr(files, method)
        a, b = (s.train_batch(np.arange(4), np.arange(4)) for s in (source, other))
        jax.tree.map(np.testing.assert_array_equal, a, b)
        a, b = (s.test_batch(np.arange(5)) for s in (source, other))
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert dataset.description.mean == files.description.mean


def test_pictures_that_are_all_grey_have_one_channel():
    grey = items(8, lambda image: Image.fromarray(image[..., 0]))
    mixed = Items(
        [*items(4, lambda image: Image.fromarray(image[..., 0])).examples, *items(4, png)]
    )
    for part, channels in ((grey, 1), (mixed, 3)):
        dataset = given.load(data_config(), {"train": part, "test": part})
        assert dataset.description.image_shape == (16, 16, channels)


def test_a_picture_that_cannot_be_read_is_counted_and_named():
    part = Items([*items(8, png).examples, (png(IMAGES[0])[:60], 1)])
    dataset = given.load(data_config(max_bad=0.2), {"train": part, "test": items(4, png)})
    assert len(dataset.train) == 8
    (line,) = dataset.bad
    assert line.startswith("dataset['train'][8]: ")


BAD = {
    "no mapping": (5, "dataset is of type int; right would be train_images, train_labels, "),
    "no key": (
        {k: v for k, v in ARRAYS.items() if k != "test_labels"},
        "dataset has test_images, train_images, train_labels, and lacks test_labels; right would",
    ),
    "another key": (ARRAYS | {"valid": 1}, "dataset has valid, which is of no use; right"),
    "lengths": (ARRAYS | {"train_labels": LABELS[:5]}, "train_labels'] has 5 labels for 64 images"),
    "a label above": (
        ARRAYS | {"label_names": ["a", "b"]},
        "dataset['train_labels'] has the label 3, and there are names for 0 to 1",
    ),
    "a label below": (ARRAYS | {"test_labels": LABELS[:10] - 1}, "test_labels'] has the label -1"),
    "a fraction": (ARRAYS | {"train_labels": LABELS / 2}, "is float64; labels must be integers"),
    "floats": (
        ARRAYS | {"train_images": IMAGES / 255},
        "images must be uint8, 0 to 255: np.round(",
    ),
    "rank": (
        ARRAYS | {"test_images": IMAGES[:10, 0, 0]},
        "images must be [N, H, W] or [N, H, W, C]",
    ),
    "shapes": (
        ARRAYS | {"test_images": IMAGES[:10, :8]},
        "has images of 8 x 16 x 3, and those to ",
    ),
    "nothing": (ARRAYS | {"test_images": IMAGES[:0], "test_labels": LABELS[:0]}, "no images in it"),
    "no items": ({"train": items(), "test": []}, "dataset['test'] is empty"),
    "an iterator": (
        {"train": iter(items()), "test": items()},
        "len and access at random, [i]: no it",
    ),
    "no pair": (
        {"train": Items(IMAGES), "test": items()},
        "dataset['train'][0] is a ndarray; right",
    ),
    "no label": (
        {"train": [{"image": IMAGES[0]}], "test": items()},
        "dataset['train'][0] has image;",
    ),
    "an item's label": (
        {"train": [(IMAGES[0], 0), (IMAGES[1], -2)], "test": items()},
        "dataset['train'][1] has the label -2; right would be 0 to ",
    ),
    "an item's text": (
        {"train": [(IMAGES[0], "cat")], "test": items()},
        "right would be an integer",
    ),
    "an item's floats": (
        {"train": [(IMAGES[0] / 255, 0)], "test": items()},
        "[0] is float64; images",
    ),
    "kinds": ({"train": items(), "test": items(4, png)}, "has pictures, and those to train on are"),
    "names": ({"train": items(), "test": items(), "label_names": "abcd"}, "a text for each class"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_data_set_gets_one_line(case):
    found, right = BAD[case]
    with pytest.raises(UserError, match=re.escape(right)) as error:
        given.load(data_config(), found)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("example", "right"),
    [
        ((IMAGES[0], 9), "dataset['train'][1] has the label 9; right would be 0 to 3."),
        (
            (IMAGES[0, :8], 1),
            "[1] is an array [8, 16, 3], and the first one is an array [16, 16, 3]",
        ),
        ((png(IMAGES[0]), 1), "[1] is a picture, and the first one is an array [16, 16, 3]"),
    ],
)
def test_what_is_no_example_is_told_where_it_is_met(example, right):
    part = Items([(IMAGES[0], 0), example])
    config = data_config(mean=(0.5,) * 3, std=(0.2,) * 3)
    found = {"train": part, "test": items(4), "label_names": list("abcd")}
    dataset = given.load(config, found)
    with pytest.raises(UserError, match=re.escape(right)):
        dataset.train.train_batch(np.array([1]), np.array([0]))


def test_further_images_have_names():
    further = {"hard": items(20), "odd": {"images": IMAGES[1::2], "labels": LABELS[1::2]}}
    found = {"train": items(), "test": items(10), "eval": further}
    dataset = given.load(data_config(), found)
    assert {name: len(source) for name, source in dataset.further.items()} == {
        "hard": 20,
        "odd": 32,
    }
    np.testing.assert_array_equal(
        dataset.further["odd"].test_batch(np.arange(32))["label"], LABELS[1::2]
    )
    for wrong, right in (
        ([1], "dataset['eval'] is of type list; right would be {NAME: object"),
        ({"a/b": items()}, "has the name 'a/b'"),
        ({"a": {"images": IMAGES}}, "dataset['eval']['a'] has images; right would be"),
        (
            {"a": [(IMAGES[0], 7)]},
            "dataset['eval']['a'] has labels that the training set has not: 7",
        ),
        ({"a": {"images": IMAGES, "labels": [0]}}, "['a']['labels'] has 1 labels for 64 images"),
    ):
        with pytest.raises(UserError, match=re.escape(right)):
            given.load(data_config(), found | {"eval": wrong})


@pytest.mark.parametrize("form", ["arrays", "val", "validation"])
def test_images_to_validate_on_may_be_given_too(form):
    found = {"train": items(), "test": items(10), form: items(4)}
    if form == "arrays":
        found = ARRAYS | {"val_images": IMAGES[:4], "val_labels": LABELS[:4]}
    dataset = given.load(data_config(), found)
    np.testing.assert_array_equal(dataset.val.test_batch(np.arange(4))["image"], IMAGES[:4])
    assert dataset.evaluated is dataset.val
    with pytest.raises(UserError, match=r"val_share 0\.5 must be 0: the images of 'given' have so"):
        given.load(data_config(val_share=0.5), found)
    if form == "arrays":
        with pytest.raises(UserError, match=r"and lacks val_labels; right"):
            given.load(data_config(), {k: v for k, v in found.items() if k != "val_labels"})


def test_a_dataset_is_taken_as_it_is():
    own = sources.load(plain_config().data)
    assert given.load(data_config(), own) is own
    wrong = ArraySource(own.train.images, own.train.labels + 5)
    with pytest.raises(
        UserError, match=r"dataset\.train\.labels has the label 14; by its descript"
    ):
        given.load(data_config(), sources.Dataset(wrong, own.test, own.description, own.bad))


def test_splits_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    names = ["cat", "dog"]
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "label": datasets.ClassLabel(names=names),
            "n": datasets.Value("int64"),
        }
    )
    table = {"img": [Image.fromarray(i) for i in IMAGES[:8]], "label": [0, 1] * 4, "n": range(8)}
    split = datasets.Dataset.from_dict(table, features=features)
    found = datasets.DatasetDict(train=split, test=split.select([3, 5]))
    dataset = given.load(data_config(), found)
    np.testing.assert_array_equal(dataset.train.images, IMAGES[:8])
    np.testing.assert_array_equal(dataset.test.labels, [1, 1])
    assert dataset.description.label_names == ("cat", "dog")
    pixels = datasets.Features(
        {"image": datasets.Array3D((16, 16, 3), "uint8"), "label": datasets.Value("int32")}
    )
    table = {"image": list(IMAGES[:8]), "label": [0, 1] * 4}
    split = datasets.Dataset.from_dict(table, features=pixels)
    dataset = given.load(data_config(), {"train": split, "test": split})
    assert isinstance(dataset.train, DecodedSource)
    np.testing.assert_array_equal(dataset.train.test_batch(np.array([6]))["image"], IMAGES[6:7])
    renamed = split.rename_column("label", "kind")
    with pytest.raises(UserError, match=r"has the columns image .* rename_column"):
        given.load(data_config(), {"train": renamed, "test": renamed})
    with pytest.raises(UserError, match="no iterator, and no stream"):
        given.load(data_config(), {"train": split.to_iterable_dataset(), "test": split})


# Of a schedule that does not depend on the length of the run.
CONSTANT = {"optim.schedule": "step", "data.source": "digits"}


def constant_config(**fields):
    return plain_config(**CONSTANT, **fields)


def test_a_run_goes_on_with_its_images_bit_for_bit(tmp_path):
    one_by_one = {"train": items(), "test": items(10), "label_names": list("0123")}
    one_by_one["eval"] = {"same": items(10)}
    whole = resflax.train_and_evaluate(
        constant_config(), str(tmp_path / "whole"), dataset=one_by_one
    )
    config = constant_config(**{"train.epochs": 1.0})
    resflax.train_and_evaluate(config, tmp_path / "run", dataset=ARRAYS)
    assert config.data.source == "digits"
    found = resflax.train_and_evaluate(constant_config(), tmp_path / "run", dataset=ARRAYS)
    assert found["eval/loss"] == pytest.approx(whole["eval/loss"], rel=1e-6)
    a, b = (resflax.restore(tmp_path / name) for name in ("whole", "run"))
    assert (a.step, b.step, a.config.data.source) == (4, 4, "given")
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)
    assert b.preprocess(IMAGES[:2]).shape == (2, 16, 16, 3)
    assert whole["eval_same/loss"] == whole["eval/loss"]
    again = evaluate.evaluate_run(tmp_path / "run", dataset=ARRAYS)
    assert again["loss"] == pytest.approx(found["eval/loss"], rel=1e-6)
    looked_at = subject.from_run(tmp_path / "run", images=4, parts=Parts.of_objects(dataset=ARRAYS))
    assert len(looked_at.images) == 4
    for function in (evaluate.evaluate_run, lambda run: subject.from_run(run, images=4)):
        with pytest.raises(UserError, match=r"data set of .* \(get_dataset: given in train_and_"):
            function(tmp_path / "run")
    other = ARRAYS | {"train_images": IMAGES // 2}
    with pytest.raises(UserError, match=r"config or data were others \(data mean"):
        resflax.train_and_evaluate(constant_config(), tmp_path / "run", dataset=other)


def test_without_its_images_a_run_does_not_start(tmp_path):
    config = plain_config(**{"data.source": "given"})
    with pytest.raises(UserError, match=r"pass them as dataset=\.\.\."):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
