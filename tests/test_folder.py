"""Directories of images by class."""

import numpy as np
import pytest
from PIL import Image

from resflax.data import folder
from resflax.data.bad import UnreadableImage


def save(path, colour, size=(20, 12), **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **kwargs)


@pytest.fixture
def cats_and_dogs(tmp_path):
    for i in range(10):
        save(tmp_path / "cats" / f"{i}.jpg", "red")
        save(tmp_path / "dogs" / f"{i}.PNG", "blue")
    (tmp_path / "cats" / "notes.txt").write_text("not an image")
    return tmp_path


def test_a_share_of_each_class_is_set_aside(cats_and_dogs):
    train, val, names = folder.examples(cats_and_dogs, val_share=0.3, seed=0)
    assert names == ("cats", "dogs")
    assert [label for _, label in train].count(0) == [label for _, label in train].count(1) == 7
    assert not {path for path, _ in train} & {path for path, _ in val}
    assert len(train) + len(val) == 20
    again, _, _ = folder.examples(cats_and_dogs, val_share=0.3, seed=0)
    other, _, _ = folder.examples(cats_and_dogs, val_share=0.3, seed=1)
    assert train == again != other


def test_train_and_val_have_the_classes_of_train(tmp_path):
    for name in ("a", "b", "c"):
        save(tmp_path / "train" / name / "1.jpg", "red")
    for name in ("c", "b"):
        save(tmp_path / "val" / name / "1.jpg", "red")
    train, val, names = folder.examples(tmp_path, val_share=0.5, seed=0)
    assert names == ("a", "b", "c")
    assert [label for _, label in train] == [0, 1, 2]
    assert [(path.parent.name, label) for path, label in val] == [("b", 1), ("c", 2)]


@pytest.mark.parametrize(
    ("make", "right"),
    [
        (lambda root: None, "is not a directory"),
        (lambda root: root.mkdir(), "0 directories of classes"),
        (lambda root: save(root / "cats/1.jpg", "red"), "1 directories of classes"),
        (
            lambda root: (save(root / "cats/1.jpg", "red"), (root / "dogs").mkdir()),
            r"dogs has no images \(.jpg, .jpeg, .png\)",
        ),
        (
            lambda root: [save(root / "train" / n / "1.jpg", "red") for n in "ab"],
            "no val/ beside it",
        ),
        (
            lambda root: [
                save(root / split / n / "1.jpg", "red")
                for split, names in (("train", "ab"), ("val", "abc"))
                for n in names
            ],
            "classes that train/ has not: c",
        ),
        (lambda root: [save(root / n / "1.jpg", "red") for n in "ab"], "1 images is 0"),
    ],
)
def test_what_is_no_data_set_is_told_why(tmp_path, make, right):
    make(tmp_path / "root")
    with pytest.raises(folder.FolderError, match=right):
        folder.examples(tmp_path / "root", val_share=0.2, seed=0)


def test_a_source_gives_the_files_as_they_are(cats_and_dogs):
    train, _, _ = folder.examples(cats_and_dogs, val_share=0.3, seed=0)
    source = folder.FolderSource.of(train)
    assert len(source) == 14
    for i, (path, label) in enumerate(train):
        example = source[i]
        assert example["image"] == path.read_bytes()
        assert example["label"] == label
        assert example["label"].dtype == np.int32
        assert source.name(i) == str(path)
    with pytest.raises(IndexError):
        source[14]


def test_a_file_that_is_gone_cannot_be_read(cats_and_dogs):
    source = folder.FolderSource.of([(cats_and_dogs / "cats" / "99.jpg", 0)])
    with pytest.raises(UnreadableImage, match="it cannot be opened: No such file"):
        source[0]


def test_no_path_is_not_the_current_directory():
    with pytest.raises(folder.FolderError, match=r"config\.data\.folder\.path is empty"):
        folder.examples("", val_share=0.5, seed=0)
