"""Data sets that are saved as arrays."""

import gzip
import pathlib
import re
import struct
import tracemalloc

import numpy as np
import pytest

from resflax.data import arrays, idx, location

OURS = ("train_images", "train_labels", "test_images", "test_labels")
KERAS = ("x_train", "y_train", "x_test", "y_test")
IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def values(**changes):
    """The four arrays of a small data set of three classes."""
    rng = np.random.default_rng(0)
    good = {
        "train_images": rng.integers(256, size=(9, 6, 5, 3), dtype=np.uint8),
        "train_labels": np.arange(9) % 3,
        "test_images": rng.integers(256, size=(4, 6, 5, 3), dtype=np.uint8),
        "test_labels": np.array([2, 0, 1, 1], np.uint8),
    }
    return good | changes


def save_npz(path, contents):
    np.savez(path / "set.npz", **contents)
    return path / "set.npz"


def save_npy(path, contents):
    for name, array in contents.items():
        np.save(path / f"{name}.npy", array)
    return path


def to_idx(array):
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def save_idx(path, contents, names=IDX, pack=bytes):
    for file, array in zip(names, (contents[name] for name in OURS), strict=True):
        (path / file).write_bytes(pack(to_idx(array)))
    return path


def check(loaded, contents):
    for name in OURS:
        array = getattr(loaded, name)
        expected = np.asarray(contents[name])
        assert array.dtype == (np.uint8 if name.endswith("images") else np.int32)
        if name.endswith("images"):
            np.testing.assert_array_equal(array, expected.reshape(*expected.shape[:3], -1))
        else:
            np.testing.assert_array_equal(array, expected.reshape(-1))


@pytest.mark.parametrize("save", [save_npz, save_npy])
@pytest.mark.parametrize("names", [OURS, KERAS])
def test_numpys_files(tmp_path, save, names):
    contents = values()
    loaded = arrays.load(save(tmp_path, dict(zip(names, contents.values(), strict=True))))
    check(loaded, contents)
    assert loaded.label_names == ("0", "1", "2")


def test_labels_may_have_a_second_axis_and_images_no_channels(tmp_path):
    contents = values(train_labels=(np.arange(9) % 3)[:, None])
    for name in ("train_images", "test_images"):
        contents[name] = contents[name][..., 0]
    loaded = arrays.load(save_npz(tmp_path, contents))
    check(loaded, contents)
    assert loaded.train_images.shape == (9, 6, 5, 1)


def test_files_of_images_are_mapped_and_not_read(tmp_path):
    loaded = arrays.load(save_npy(tmp_path, values()))
    for images in (loaded.train_images, loaded.test_images):
        assert isinstance(images, np.memmap)
        assert not images.flags.writeable


def test_names_of_labels(tmp_path):
    names = ("cat", "naïve dog", "fish", "one that has no image")
    for save in (save_npz, save_npy):
        contents = values(label_names=np.array(names))
        assert arrays.load(save(tmp_path, contents)).label_names == names
    (tmp_path / "label_names.npy").unlink()
    (tmp_path / "label_names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    assert arrays.load(tmp_path).label_names == names


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("separator", ["-", "."])
def test_files_of_mnists_family(tmp_path, pack, separator):
    contents = values()
    for name in ("train_images", "test_images"):
        contents[name] = contents[name][..., 0]
    ending = ".gz" if pack is gzip.compress else ""
    names = [file.replace("-idx", f"{separator}idx") + ending for file in IDX]
    check(arrays.load(save_idx(tmp_path, contents, names, pack)), contents)


def test_prepared_data_sets_have_names(tmp_path, monkeypatch):
    monkeypatch.setenv("RESFLAX_DATA_DIR", str(tmp_path))
    (tmp_path / "mine").mkdir()
    save_npy(tmp_path / "mine", values())
    check(arrays.load("mine"), values())
    with pytest.raises(arrays.ArraysError, match=f"{tmp_path}/others"):
        arrays.load("others")


def test_where_prepared_data_sets_live(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for name in ("RESFLAX_DATA_DIR", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, "")
    assert location.data_dir() == pathlib.Path("/home/someone/.local/share/resflax")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert location.data_dir() == pathlib.Path("/data/resflax")
    monkeypatch.setenv("RESFLAX_DATA_DIR", "~/sets")
    assert location.data_dir() == pathlib.Path("/home/someone/sets")


def test_an_unknown_path_is_told_what_would_be_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESFLAX_DATA_DIR", str(tmp_path / "prepared"))
    for path, places in (
        ("mnist", f"{tmp_path}/mnist or {tmp_path}/prepared/mnist"),
        ("some/set.npz", f"{tmp_path}/some/set.npz."),
    ):
        with pytest.raises(arrays.ArraysError) as error:
            arrays.load(path)
        message = str(error.value)
        assert places in message
        assert all(form in message for form in (".npz file", ".npy files", "IDX files", "prepare"))
        assert "\n" not in message
    with pytest.raises(arrays.ArraysError, match=r"no data set ''\. Right would be"):
        arrays.load("")


RGB = np.zeros((9, 6, 5, 3))
NOT_A_NUMBER = np.full((9, 6, 5, 3), np.nan)
ADVICE = r"\.astype\(np.uint8\)"


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({"train_images": RGB}, rf"float64; images must be uint8.*images \* 255\){ADVICE}"),
        ({"train_images": RGB + 9}, rf"float64; images must be uint8.*round\(images\){ADVICE}"),
        ({"train_images": RGB - 0.5}, r"go from -0\.5 to -0\.5: bring them there first"),
        ({"train_images": NOT_A_NUMBER}, r"NaN or infinite .*correct them first"),
        ({"train_images": RGB.astype(int)}, rf"int64; images must be uint8.*{ADVICE}"),
        ({"train_images": RGB.astype(bool)}, r"bool; images must be uint8, 0 to 255\."),
        ({"train_images": RGB[0].astype(np.uint8)[0]}, r"uint8 \[5, 3\]; images must be"),
        ({"train_images": RGB.astype(np.uint8)[:0]}, r"there are no images"),
        ({"train_images": np.zeros((9, 3, 32, 32), np.uint8)}, r"looks like \[N, C, H, W\]"),
        ({"test_images": np.zeros((4, 6, 6, 3), np.uint8)}, r"of 6 x 6 x 3, .*of 6 x 5 x 3"),
        ({"train_images": np.zeros((8, 6, 5, 3), np.uint8)}, "9 labels for 8 images"),
        ({"test_labels": np.zeros(5, int)}, "test_labels.* has 5 labels for 4 images"),
        ({"train_labels": np.arange(9.0)}, "float64; labels must be integers"),
        ({"train_labels": np.eye(9, dtype=int)}, r"\[9, 9\]; .* one-hot rows, labels.argmax"),
        ({"train_labels": np.arange(9) - 1}, "has the label -1; labels must be classes"),
        ({"test_labels": np.array([2**32, 0, 1, 1])}, "test_labels.* has the label 4294967296"),
        ({"train_labels": np.full(9, 1)}, "has the label 1 alone; .* two"),
        ({"test_labels": np.array([0, 7, 8, 1])}, "labels that the training set has not: 7, 8"),
        ({"train_labels": np.arange(9) % 3 + 1, "test_labels": np.ones(4, int)}, "3 and none of 0"),
        ({"train_labels": np.arange(9) % 3 * 10**9, "test_labels": np.zeros(4, int)}, "of 1, 2, "),
        ({"label_names": np.array(["a", "b"])}, "the label 2, and there are names for 0 to 1"),
        ({"label_names": np.array([1, 2, 3])}, "label_names.* is int64.*list of strings"),
    ],
)
@pytest.mark.parametrize("save", [save_npz, save_npy])
def test_what_cannot_be_trained_on_is_told_why(tmp_path, save, changes, right):
    with pytest.raises(arrays.ArraysError, match=right) as error:
        arrays.load(save(tmp_path, values(**changes)))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("save", [save_npz, save_npy])
def test_objects_are_refused(tmp_path, save):
    path = save(tmp_path, values(train_labels=np.array([0, 1, 2] * 3, object)))
    with pytest.raises(arrays.ArraysError, match=r"train_labels.* pickle"):
        arrays.load(path)


def test_directories_that_lack_a_file(tmp_path):
    with pytest.raises(arrays.ArraysError, match=r"no \.npy and no IDX files"):
        arrays.load(tmp_path)
    save_idx(tmp_path, values())
    (tmp_path / IDX[3]).unlink()
    with pytest.raises(arrays.ArraysError, match=rf"lacks {IDX[3]} \(or \.gz\)"):
        arrays.load(tmp_path)
    save_npy(tmp_path, values())
    (tmp_path / "test_labels.npy").unlink()
    with pytest.raises(arrays.ArraysError, match=r"has test_images, .*; a data set has train_"):
        arrays.load(tmp_path)


def test_broken_files(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(arrays.ArraysError, match=r"text\.npz is no \.npz file"):
        arrays.load(tmp_path / "text.npz")
    path = save_npz(tmp_path, values())
    path.write_bytes(path.read_bytes().replace(values()["train_images"].tobytes(), bytes(810)))
    with pytest.raises(arrays.ArraysError, match=r"train_images cannot be read: Bad CRC"):
        arrays.load(path)
    save_npy(tmp_path, values())
    for data in (b"", b"some text", (tmp_path / "test_images.npy").read_bytes()[:200]):
        (tmp_path / "test_images.npy").write_bytes(data)
        with pytest.raises(arrays.ArraysError, match=r"test_images\.npy cannot be read: "):
            arrays.load(tmp_path)


def test_idx_has_any_number_of_dimensions(tmp_path):
    for shape in ((3,), (2, 3), (2, 3, 4, 5)):
        array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        (tmp_path / "file").write_bytes(to_idx(array))
        np.testing.assert_array_equal(idx.read(tmp_path / "file"), array)


WHOLE = to_idx(np.arange(6, dtype=np.uint8).reshape(2, 3))


@pytest.mark.parametrize(
    ("data", "right"),
    [
        (b"", "begins with the bytes (none); an IDX file"),
        (b"\0\0\x0d\x01" + WHOLE[4:], "begins with the bytes 00 00 0d 01; an IDX file of uint8"),
        (b"\0\0\x08\0", "begins with the bytes 00 00 08 00"),
        (WHOLE[:9], "has 9 bytes; its header alone has 12"),
        (WHOLE[:-1], "has 17 bytes (unpacked); with its shape 2 x 3 it would have 18"),
        (WHOLE + b"\0", "has 19 bytes (unpacked)"),
        (gzip.compress(WHOLE, mtime=0)[:-12], "was cut short"),
        (gzip.compress(WHOLE, mtime=0)[:-8] + bytes(8), "is a broken gzip archive"),
        (gzip.compress(WHOLE[:-1], mtime=0), "has 17 bytes (unpacked)"),
        (gzip.compress(WHOLE[:9], mtime=0), "has 9 bytes; its header alone has 12"),
        (gzip.compress(b"no IDX file", mtime=0), "begins with the bytes 6e 6f 20 49"),
        (gzip.compress(WHOLE[:4] + b"\xff" * 8, mtime=0), "this machine has"),
    ],
)
def test_what_is_no_idx_file_is_told_why(tmp_path, data, right):
    path = save_idx(tmp_path, values()) / IDX[0]
    path.write_bytes(data)
    with pytest.raises(idx.IdxError, match=re.escape(f"{path} ") + ".*" + re.escape(right)):
        idx.read(path)
    with pytest.raises(arrays.ArraysError, match=re.escape(right)):
        arrays.load(tmp_path)


def test_an_archive_is_unpacked_no_further_than_its_header_says(tmp_path):
    (tmp_path / "bomb").write_bytes(gzip.compress(WHOLE + bytes(2**26), 1))
    tracemalloc.start()
    with pytest.raises(idx.IdxError, match=r"has 19 bytes \(unpacked\); .* it would have 18"):
        idx.read(tmp_path / "bomb")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_a_file_that_is_not_there():
    with pytest.raises(idx.IdxError, match="nowhere cannot be read: No such file"):
        idx.read("nowhere")
