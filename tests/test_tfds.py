"""Data sets that the real library prepares here, as array_record and, with TensorFlow, TFRecord."""

import concurrent.futures
import importlib.util
import io
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image
from plain import config as plain_config

from resflax.data import sources, tfds

# The library calls what some versions of protobuf deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow_datasets")

NAMES = ("cat", "dog", "fish")


def pixels(number, size=(5, 4)):
    """An image that tells its number."""
    return np.full((*size, 3), number, np.uint8)


def png(number):
    file = io.BytesIO()
    Image.fromarray(pixels(number)).save(file, "PNG")
    return file.getvalue()


class Images(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
    """Images as the bytes of their files, which takes no TensorFlow."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent
    features = tensorflow_datasets.features

    def _info(self):
        return self.dataset_info_from_configs(features=self.features.FeaturesDict(self.kinds()))

    def kinds(self):
        return {
            "image": self.features.Image(shape=(5, 4, 3)),
            "label": self.features.ClassLabel(names=NAMES),
            "file_name": self.features.Text(),
            # An image that nothing here can decode: it must be left alone.
            "mask": self.features.Image(shape=(None, None, 1)),
        }

    def _split_generators(self, dl_manager):
        counts = {"train": 20, "test": 6, "unlabelled": 2}
        return {split: self._generate_examples(split, n) for split, n in counts.items()}

    def _generate_examples(self, split, count):
        for i in range(count):
            yield i, self.example(split, i)

    def example(self, split, i):
        return {
            "image": io.BytesIO(png(i)),
            "label": -1 if split == "unlabelled" else i % 3,
            "file_name": f"{split}{i}.png",
            "mask": io.BytesIO(b"broken"),
        }


class Tiny(Images, skip_registration=True):
    name = "tiny"


class Raw(Images, skip_registration=True):
    """Pixels as they are."""

    name = "raw"

    def kinds(self):
        image = self.features.Tensor(shape=(5, 4, 3), dtype=np.uint8)
        return {"image": image, "label": self.features.ClassLabel(names=NAMES)}

    def example(self, split, i):
        return {"image": pixels(i), "label": i % 3}


class Unlabelled(Images, skip_registration=True):
    """Features that are of no use here."""

    name = "unlabelled"

    def kinds(self):
        return {"picture": self.features.Text(), "label": self.features.Scalar(np.int64)}

    def example(self, split, i):
        return {"picture": "", "label": 0}


def prepare(builder, data_dir, file_format="array_record"):
    built = builder(data_dir=data_dir, file_format=file_format)
    config = tensorflow_datasets.download.DownloadConfig(try_download_gcs=False)
    built.download_and_prepare(download_config=config)
    return pathlib.Path(built.data_dir)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tensorflow_datasets")
    for builder in (Tiny, Raw, Unlabelled):
        prepare(builder, path)
    return path


def numbers(source):
    """The numbers that the images of a source tell, with their labels."""
    images = (np.asarray(Image.open(io.BytesIO(example["image"]))) for example in source)
    return [(int(i[0, 0, 0]), int(e["label"])) for i, e in zip(images, source, strict=True)]


def examples(source):
    return [source[i] for i in range(len(source))]


SPLITS = {"train_split": "train", "test_split": "test"}


def test_images_stay_encoded(data_dir):
    dataset = tfds.open_dataset("tiny", data_dir=data_dir, **SPLITS)
    assert (len(dataset.train), len(dataset.test)) == (20, 6)
    assert dataset.label_names == NAMES
    assert dataset.image_shape == (5, 4, 3)
    assert dataset.encoded
    assert dataset.where == data_dir / "tiny" / "1.0.0"
    read = examples(dataset.train)
    assert sorted(numbers(read)) == [(i, i % 3) for i in range(20)]
    assert all(example.keys() == {"image", "label"} for example in read)
    assert all(example["label"].dtype == np.int32 for example in read)
    (number, _) = numbers([read[7]])[0]
    assert read[7]["image"] == png(number)
    assert dataset.train.name(7) == f"{dataset.where} train[7] (train{number}.png)"


def test_examples_are_read_at_random_by_many_threads(data_dir):
    train = tfds.open_dataset("tiny", data_dir=data_dir, **SPLITS).train
    expected = numbers(examples(train))
    order = np.random.default_rng(0).integers(len(train), size=400)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = numbers(list(pool.map(train.__getitem__, order)))
    assert read == [expected[i] for i in order]


def test_splits_have_usual_names(data_dir):
    dataset = tfds.open_dataset("tiny", data_dir=data_dir)
    assert (dataset.train.split, dataset.test.split) == ("train", "test")
    assert (len(dataset.train), len(dataset.test)) == (20, 6)


def test_parts_of_splits(data_dir):
    parts = {"train_split": "train[:75%]", "test_split": "train[75%:]"}
    dataset = tfds.open_dataset("tiny", data_dir=data_dir, **parts)
    train, test = (numbers(examples(source)) for source in (dataset.train, dataset.test))
    assert (len(train), len(test)) == (15, 5)
    assert sorted(train + test) == [(i, i % 3) for i in range(20)]


def test_a_split_to_validate_on_has_no_image_to_train_on(data_dir):
    parts = {"train_split": "train[:75%]", "val_split": "train[75%:]", "test_split": "test"}
    dataset = tfds.open_dataset("tiny", data_dir=data_dir, **parts)
    train, val = (numbers(examples(source)) for source in (dataset.train, dataset.val))
    assert sorted(train + val) == [(i, i % 3) for i in range(20)]
    assert (len(val), len(dataset.test)) == (5, 6)
    for train_split in ("train", "test+train[70%:80%]"):
        with pytest.raises(
            tfds.TfdsError, match=r"val_split 'train\[75%:\]' .* has images of train_"
        ):
            tfds.open_dataset("tiny", data_dir=data_dir, **parts | {"train_split": train_split})


@pytest.mark.parametrize("name", ["tiny", "raw"])
def test_a_config_names_a_split_to_validate_on(data_dir, name):
    config = plain_config(
        **{"data.source": "tfds", "data.image_size": 8, "data.eval_resize": 8}
    ).data
    config.tfds.update(name=name, data_dir=str(data_dir))
    config.tfds.update(train_split="train[:75%]", val_split="train[75%:]")
    dataset = sources.load(config)
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [15, 5, 6]
    assert dataset.val.images.shape == (5, *dataset.description.image_shape)
    config.val_share = 0.4
    with pytest.raises(
        tfds.UserError, match=r"val_share 0\.4 must be 0: the images of 'tfds' have"
    ):
        sources.load(config)
    # Without a split of their own, the labels are read from the records.
    config.tfds.val_split = ""
    dataset = sources.load(config)
    assert len(dataset.train) + len(dataset.val) == 15
    assert np.bincount(dataset.val.labels).tolist() == [2, 2, 2]


def test_images_that_are_stored_as_pixels(data_dir):
    dataset = tfds.open_dataset("raw", data_dir=data_dir, **SPLITS)
    assert not dataset.encoded
    example = dataset.train[3]
    assert example["image"].dtype == np.uint8
    np.testing.assert_array_equal(example["image"], pixels(example["image"][0, 0, 0]))


@pytest.mark.long
def test_no_tensorflow_is_imported(data_dir):
    code = (
        "import sys\n"
        "from resflax.data import tfds\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        f"d = tfds.open_dataset('tiny', data_dir={str(data_dir)!r}, **{SPLITS})\n"
        "d.train[0]\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_not_there_is_said_at_once(tmp_path, monkeypatch):
    start = time.perf_counter()
    with pytest.raises(tfds.TfdsError) as error:
        tfds.open_dataset("cifar10", data_dir=tmp_path)
    assert time.perf_counter() - start < 0.1
    assert str(tmp_path / "cifar10") in str(error.value)
    assert "python -m resflax.data prepare cifar10 " in str(error.value)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(tfds.TfdsError, match="elsewhere/cifar10"):
        tfds.open_dataset("cifar10")
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(tfds.TfdsError, match=f"{tmp_path}/tensorflow_datasets/cifar10"):
        tfds.open_dataset("cifar10")


def described(path, files=("dataset_info.json", "features.json")):
    path.mkdir(parents=True)
    for file in files:
        (path / file).write_text("{}")
    return path


def test_the_newest_version_is_found_unless_another_is_named(tmp_path):
    for version in ("1.0.0", "1.10.0", "1.9.0", "incomplete.X_3.0.0"):
        described(tmp_path / "a" / version)
    described(tmp_path / "a" / "2.0.0", ("dataset_info.json",))  # older than TFDS 4
    assert tfds.find("a", tmp_path).name == "1.10.0"
    assert tfds.find("a:1.9.0", tmp_path).name == "1.9.0"
    for version in ("1.2.0", "2.0.0"):
        with pytest.raises(tfds.TfdsError, match=f"no data set at {tmp_path}/a/{version}: "):
            tfds.find(f"a:{version}", tmp_path)


def test_configurations(tmp_path):
    described(tmp_path / "a" / "small" / "1.0.0")
    assert tfds.find("a", tmp_path) == tfds.find("a/small:1.0.0", tmp_path)
    large = described(tmp_path / "a" / "large-v2" / "1.0.0")
    assert tfds.find("a/large-v2", tmp_path) == large
    with pytest.raises(tfds.TfdsError, match=r"configurations large-v2, small: say which"):
        tfds.find("a", tmp_path)
    for name in ("a b", "a:1", "../a", "a/b/c", ""):
        with pytest.raises(tfds.TfdsError, match="is no name"):
            tfds.find(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "splits", "right"),
    [
        ("tiny", {"train_split": "train", "test_split": "val"}, "test_split 'val' is no split of"),
        (
            "tiny",
            {"train_split": "train[:", "test_split": "test"},
            "which has .*train.*; parts are",
        ),
        ("tiny", {"train_split": "train[:0]", "test_split": "test"}, "has no examples"),
        ("unlabelled", SPLITS, r"features label \(Scalar\), picture \(Text\); for classification"),
    ],
)
def test_what_cannot_be_used_is_told_why(data_dir, name, splits, right):
    with pytest.raises(tfds.TfdsError, match=right) as error:
        tfds.open_dataset(name, data_dir=data_dir, **splits)
    assert "\n" not in str(error.value)


def test_a_split_without_labels(data_dir):
    splits = {"train_split": "unlabelled", "test_split": "test"}
    source = tfds.open_dataset("tiny", data_dir=data_dir, **splits).train
    with pytest.raises(tfds.TfdsError, match=r"unlabelled\[1\] .* has the label -1"):
        source[1]


def test_files_that_are_missing_or_broken(tmp_path):
    where = prepare(Tiny, tmp_path)
    (shard,) = where.glob("*test*")
    shard.unlink()
    with pytest.raises(tfds.TfdsError, match=r"not whole: tiny-test.array_record-00000-of-00001"):
        tfds.open_dataset("tiny", data_dir=tmp_path, **SPLITS)
    (where / "features.json").write_text("{}")
    with pytest.raises(tfds.TfdsError, match=f"{where} cannot be read: "):
        tfds.open_dataset("tiny", data_dir=tmp_path, **SPLITS)
    (where / "dataset_info.json").write_text("{")
    with pytest.raises(tfds.TfdsError, match=r"dataset_info\.json cannot be read: "):
        tfds.open_dataset("tiny", data_dir=tmp_path, **SPLITS)


@pytest.mark.skipif(bool(importlib.util.find_spec("tensorflow")), reason="TensorFlow is there")
def test_tfrecord_without_tensorflow(tmp_path):
    where = described(tmp_path / "a" / "1.0.0")
    (where / "dataset_info.json").write_text(json.dumps({"fileFormat": "tfrecord"}))
    with pytest.raises(tfds.TfdsError, match=r"pip install 'resflax\[tf\]'.* convert_format") as e:
        tfds.open_dataset("a", data_dir=tmp_path, **SPLITS)
    assert str(where) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("builder", [Tiny, Raw])
def test_tfrecord_is_read_into_memory(tmp_path, data_dir, builder, monkeypatch):
    pytest.importorskip("tensorflow")
    prepare(builder, tmp_path, "tfrecord")
    dataset = tfds.open_dataset(builder.name, data_dir=tmp_path, **SPLITS)
    same = tfds.open_dataset(builder.name, data_dir=data_dir, **SPLITS)
    assert len(dataset.train) == 20
    for ours, other in zip(examples(dataset.train), examples(same.train), strict=True):
        assert ours["label"] == other["label"]
        np.testing.assert_array_equal(ours["image"], other["image"])
    monkeypatch.setattr(tfds, "_MOST_BYTES", 100)
    with pytest.raises(tfds.TfdsError, match=r"into memory. Once converted, .*convert_format"):
        tfds.open_dataset(builder.name, data_dir=tmp_path, **SPLITS)


def test_a_converted_data_set_is_read_at_random(tmp_path):
    for package in ("tensorflow", "apache_beam", "mlcroissant"):
        pytest.importorskip(package)
    where = prepare(Tiny, tmp_path, "tfrecord")
    command = tfds.conversion(where).partition(" && ")[2].split()
    tool = pathlib.Path(sys.executable).parent / command[0]
    subprocess.run([tool, *command[1:]], check=True, capture_output=True)
    assert tfds.formats(where) == {"tfrecord", "array_record"}
    for shard in where.glob("*tfrecord*"):
        shard.unlink()
    dataset = tfds.open_dataset("tiny", data_dir=tmp_path, **SPLITS)
    assert sorted(numbers(examples(dataset.train))) == [(i, i % 3) for i in range(20)]


@pytest.mark.parametrize("name", tfds.DEFAULTS)
def test_defaults_are_those_of_the_library(name):
    defaults = tfds.DEFAULTS[name]
    features = tensorflow_datasets.builder(name).info.features
    assert len(defaults.mean) == len(defaults.std) == features["image"].shape[-1]
    assert features["image"].shape[0] in (None, defaults.image_size)
