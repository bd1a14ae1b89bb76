"""Data sets made ready: Fashion-MNIST where its files are, and one of the real TFDS library."""

import gzip
import io
import pathlib
import resource
import shutil

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from resflax.data import arrays, prepare, tfds

# The library calls what some versions of protobuf deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow_datasets")

# Where Debian's package dataset-fashion-mnist puts them.
SOURCE = pathlib.Path("/usr/share/datasets/fashion-mnist")

needs_files = pytest.mark.skipif(not SOURCE.is_dir(), reason="dataset-fashion-mnist is not there")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare.fashion_mnist(SOURCE, tmp_path_factory.mktemp("data") / "new" / "fashion_mnist")


@needs_files
def test_fashion_mnist_is_prepared_whole(prepared, monkeypatch):
    assert prepared.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in prepared.parent.iterdir()] == ["fashion_mnist"]
    monkeypatch.setenv("RESFLAX_DATA_DIR", str(prepared.parent))
    loaded, original = arrays.load("fashion_mnist"), arrays.load(SOURCE)
    assert loaded.train_images.shape == (60_000, 28, 28, 1)
    assert loaded.test_images.shape == (10_000, 28, 28, 1)
    assert loaded.label_names == prepare.FASHION_MNIST_LABELS
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(original, name))
    assert np.bincount(loaded.train_labels).tolist() == [6000] * 10
    assert np.bincount(loaded.test_labels).tolist() == [1000] * 10


@needs_files
def test_what_is_there_is_left(prepared, capsys):
    times = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    assert prepare.fashion_mnist(SOURCE, prepared) == prepared
    assert (
        capsys.readouterr().out
        == f"{prepared} is there already, and whole: it was left as it is.\n"
    )
    assert times == {path: path.stat().st_mtime_ns for path in prepared.iterdir()}


@needs_files
@pytest.mark.parametrize("file", ["test_labels.npy", "label_names.txt"])
def test_something_else_is_not_overwritten(prepared, tmp_path, file):
    target = shutil.copytree(prepared, tmp_path / "fashion_mnist")
    (target / file).write_bytes(b"mine")
    with pytest.raises(prepare.PrepareError, match=rf"{target} is there, but {file} in it is not"):
        prepare.fashion_mnist(SOURCE, target)
    assert (target / file).read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["fashion_mnist"]


@needs_files
def test_nothing_is_left_of_what_could_not_be_written(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # bytes of a file
    try:
        with pytest.raises(prepare.PrepareError, match="fashion_mnist cannot be written: "):
            prepare.fashion_mnist(SOURCE, tmp_path / "fashion_mnist")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@needs_files
def test_files_are_those_published(tmp_path):
    for file in SOURCE.iterdir():
        shutil.copy(file, tmp_path)
    images, labels = (tmp_path / f"t10k-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    data = bytearray(gzip.decompress(labels.read_bytes()))
    data[-1] ^= 1
    labels.write_bytes(gzip.compress(data))
    target = tmp_path / "fashion_mnist"
    with pytest.raises(prepare.PrepareError, match=f"{labels} is not Fashion-MNIST's t10k-labels"):
        prepare.fashion_mnist(tmp_path, target)
    images.write_bytes(images.read_bytes()[:1000])
    with pytest.raises(prepare.PrepareError, match=f"{images} is a gzip archive that was cut"):
        prepare.fashion_mnist(tmp_path, target)
    assert not target.exists()


def test_a_directory_without_the_files(tmp_path):
    with pytest.raises(
        prepare.PrepareError, match=f"no {tmp_path}/train-images-idx3-ubyte.gz .*apt"
    ):
        prepare.fashion_mnist(tmp_path, tmp_path / "fashion_mnist")


class Resflax(tensorflow_datasets.core.GeneratorBasedBuilder):
    """A data set that TFDS knows by the name 'resflax'."""

    name = "resflax"
    VERSION = tensorflow_datasets.core.Version("1.2.3")
    pkg_dir_path = pathlib.Path(__file__).parent
    failure: Exception | None = None

    def _info(self):
        features = tensorflow_datasets.features
        kinds = {"image": features.Image(), "label": features.ClassLabel(num_classes=2)}
        return self.dataset_info_from_configs(features=features.FeaturesDict(kinds))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples() for split in ("train", "test")}

    def _generate_examples(self):
        if self.failure:
            raise self.failure
        file = io.BytesIO()
        Image.new("RGB", (4, 4)).save(file, "PNG")
        for label in range(2):
            yield label, {"image": io.BytesIO(file.getvalue()), "label": label}


def test_a_data_set_of_tfds(tmp_path, capfd):
    where = prepare.tfds("resflax", tmp_path)
    assert where == tmp_path / "resflax" / "1.2.3"
    assert tfds.formats(where) == {"array_record"}
    dataset = tfds.open_dataset(
        "resflax", data_dir=tmp_path, train_split="train", test_split="test"
    )
    assert len(dataset.train) == len(dataset.test) == 2
    capfd.readouterr()
    assert prepare.tfds("resflax", tmp_path) == where
    assert capfd.readouterr().out == f"{where} is there already: it was left as it is.\n"
    info = where / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(prepare.PrepareError, match=r"never overwritten.*: .*tfds convert_format"):
        prepare.tfds("resflax", tmp_path)


@pytest.mark.parametrize(
    ("failure", "right"),
    [
        (ModuleNotFoundError("No module", name="tensorflow.io"), r"tensorflow .*'resflax\[tf\]'"),
        (ModuleNotFoundError("No module", name="cv2"), r"needs cv2 .* pip install cv2"),
        (ConnectionError("cannot\nconnect"), "the network does not answer: cannot connect"),
        (AssertionError("put the file\n into x"), "cannot be prepared: put the file into x"),
    ],
)
def test_why_the_library_gives_up_is_one_line(tmp_path, monkeypatch, failure, right):
    monkeypatch.setattr(Resflax, "failure", failure)
    with pytest.raises(prepare.PrepareError, match=right) as error:
        prepare.tfds("resflax", tmp_path)
    assert "\n" not in str(error.value)


def test_names_that_tfds_has_not(tmp_path):
    with pytest.raises(prepare.PrepareError, match="has no data set 'resflaxx'; www"):
        prepare.tfds("resflaxx", tmp_path)


def test_a_network_that_does_not_answer(tmp_path, monkeypatch):
    url = "http://127.0.0.1:9/file.zip"  # nothing listens there
    monkeypatch.setattr(Resflax, "url_infos", {url: None})
    with pytest.raises(prepare.PrepareError, match=f"resflax cannot be downloaded: .* at {url}"):
        prepare.tfds("resflax", tmp_path)
    # What somebody has put there may be all that is needed.
    (tmp_path / "downloads" / "manual").mkdir(parents=True)
    (tmp_path / "downloads" / "manual" / "file.zip").touch()
    assert prepare.tfds("resflax", tmp_path).is_dir()


def test_files_that_are_put_there_by_hand_need_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(Resflax, "url_infos", {"http://127.0.0.1:9/file.zip": None})
    monkeypatch.setattr(Resflax, "MANUAL_DOWNLOAD_INSTRUCTIONS", "Put them there.")
    assert prepare.tfds("resflax", tmp_path).is_dir()
