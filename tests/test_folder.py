"""Directories of images by class."""

import os
import pathlib
import tempfile

import numpy as np
import pytest
from PIL import Image

from resflax.data import folder, sources
from resflax.data.bad import UnreadableImage
from resflax.run import workdir


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
            r"dogs has no images \(.jpg, .jpeg, .jpe, .jfif, .png\)",
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
        (
            lambda root: (
                [save(root / "train" / n / "1.jpg", "red") for n in "ab"],
                (root / "val/a").mkdir(parents=True),
            ),
            "val has no images .* of a class",
        ),
    ],
)
def test_what_is_no_data_set_is_told_why(tmp_path, make, right):
    make(tmp_path / "root")
    with pytest.raises(folder.FolderError, match=right):
        folder.examples(tmp_path / "root", val_share=0.2, seed=0)


def listed(root, **arguments):
    """Pairs of a path below the root and a label, in both parts, and what is reported."""
    lines = []
    arguments = {"val_share": 1.0, "seed": 0, **arguments}
    train, val, names = folder.examples(root, report=lines.append, **arguments)
    short = [
        [(str(path.relative_to(root)), label) for path, label in part] for part in (train, val)
    ]
    return *short, names, lines


def test_the_label_is_the_class_directorys_at_any_depth(tmp_path):
    for split in ("train", "val"):
        for place in ("cat/1.png", "cat/dog/2.png", "cat/indoor/dark/3.png", "dog/1.png"):
            save(tmp_path / split / place, "red")
    train, val, names, lines = listed(tmp_path)
    assert names == ("cat", "dog")
    expected = ["cat/1.png", "cat/dog/2.png", "cat/indoor/dark/3.png", "dog/1.png"]
    for split, part in (("train", train), ("val", val)):
        assert part == [(f"{split}/{n}", int(n.startswith("dog"))) for n in expected]
    assert lines == []


def test_hidden_files_and_directories_are_left_out_in_one_line(tmp_path):
    kept = [f"{split}/{name}/1.png" for split in ("train", "val") for name in ("cats", "dogs")]
    hidden = ".ipynb_checkpoints/cats/1.png", "__MACOSX/1.png", "cats/.cache/1.png", "cats/._1.png"
    hidden += ("cats/@eaDir/1.png", ".DS_Store")
    for name in (*kept, *(f"{split}/{name}" for split in ("train", "val") for name in hidden)):
        save(tmp_path / name, "red", format="PNG")
    (tmp_path / "train/cats/notes.txt").write_text("not an image")
    save(tmp_path / "val/loose.png", "red")
    train, val, names, (line,) = listed(tmp_path)
    assert names == ("cats", "dogs")
    assert [name for name, _ in train + val] == kept
    assert line.startswith(
        f"Files or directories left out of {tmp_path}: 12 hidden (such as train/"
    )
    assert "; 1 not .jpg, .jpeg, .jpe, .jfif, .png (such as train/cats/notes.txt); " in line
    assert line.endswith("; 1 in no class directory (such as val/loose.png).")


def test_images_of_every_ending_of_jpeg_and_png_are_taken(tmp_path):
    for ending in ("jpg", "jpeg", "JPE", "jfif", "png", "bmp"):
        for name in "ab":
            save(tmp_path / name / f"1.{ending}", "red", format="PNG")
    _, val, _, (line,) = listed(tmp_path)
    assert [name for name, _ in val if name[0] == "a"] == [
        f"a/1.{ending}" for ending in ("JPE", "jfif", "jpeg", "jpg", "png")
    ]
    assert "2 not .jpg, .jpeg, .jpe, .jfif, .png (such as a/1.bmp)" in line


def test_linked_directories_are_read_and_may_lead_back(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for i in range(3):
        save(elsewhere / "inner" / f"{i}.png", "red")
    save(root / "cats/own/1.png", "red")
    save(root / "dogs/1.png", "blue")
    (root / "birds").symlink_to(elsewhere)  # a class
    (root / "cats/all").symlink_to(elsewhere)
    (elsewhere / "inner/loop").symlink_to(elsewhere)
    (root / "cats/again").symlink_to(root / "cats/own")  # its images have a path already
    (root / "dogs/up").symlink_to(root)  # cats are no dogs
    (root / "dogs/further").symlink_to(tmp_path)
    (root / "dogs/self.png").symlink_to("self.png")  # an image, which cannot be read
    _, val, names, (line,) = listed(root)
    assert names == ("birds", "cats", "dogs")
    assert val == [
        *((f"birds/inner/{i}.png", 0) for i in range(3)),
        *((f"cats/all/inner/{i}.png", 1) for i in range(3)),
        ("cats/own/1.png", 1),
        ("dogs/1.png", 2),
        ("dogs/self.png", 2),
    ]
    assert "5 linked to a directory that is read already (such as birds/inner/loop)" in line


def test_classes_that_val_lacks_or_has_empty_are_named(tmp_path):
    for name in "abcd":
        save(tmp_path / "train" / name / "1.jpg", "red")
    save(tmp_path / "val/c/1.jpg", "red")
    for name in ("a", "empty"):
        (tmp_path / "val" / name).mkdir()
    _, val, names, lines = listed(tmp_path)
    assert names == tuple("abcd")
    assert val == [("val/c/1.jpg", 2)]
    assert lines == [
        f"{tmp_path}/val has no images of 3 of 4 classes, which are not evaluated: a, b, d."
    ]


def test_a_directory_without_splits_is_evaluated_whole(cats_and_dogs):
    train, val, _, _ = listed(cats_and_dogs, val_share=1.0)
    *parts, _, _ = listed(cats_and_dogs, val_share=0.3)
    assert train == []
    assert val == sorted([*parts[0], *parts[1]])


def test_a_directory_that_cannot_be_read_is_named():
    # Not below pytest's own directory, which is another user's.
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        for name in "ab":
            save(pathlib.Path(root, name, "1.jpg"), "red")
        pathlib.Path(root, "b", "secret").mkdir(mode=0)
        if os.getuid() == 0:  # who may read all
            os.seteuid(65534)
        try:
            with pytest.raises(folder.FolderError, match="b/secret cannot be read: Permission"):
                folder.examples(root, val_share=1.0, seed=0)
        finally:
            os.seteuid(os.getuid())


def test_names_that_are_not_utf8_are_escaped_where_they_are_shown(tmp_path):
    root, run = os.fsencode(tmp_path / "root"), tmp_path / "run"
    for name in (b"caf\xe9", b"tea\nroom"):
        for file in (b"1.png", b"\xff.png", b"\xfe.txt"):
            path = os.path.join(root, name, file)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Image.new("RGB", (20, 12), "red").save(path, "PNG")
    train, _, names, (line,) = listed(tmp_path / "root", val_share=0.5)
    assert names == (r"caf\xe9", r"tea\nroom")
    assert r"(such as caf\xe9/\xfe.txt)" in line
    source = folder.FolderSource.of([(tmp_path / "root" / name, i) for name, i in train])
    assert len(source[0]["image"]) > 0
    for text in (line, *names, *map(source.name, range(len(source)))):
        assert text.isprintable()
        assert text.encode()
    description = sources.Description("folder", (8, 8, 3), names, (0.5,) * 3, (0.5,) * 3)
    run.mkdir()
    workdir.write_description(run, description)
    assert workdir.read_description(run) == description
    workdir.write_bad_files(run, [f"{source.name(0)}: reason"])
    assert (run / "bad_files.txt").read_text().splitlines() == [f"{source.name(0)}: reason"]


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
