"""Tests of files as they are written: whole, where they were asked for, and brought to the disk."""

import os
import resource
import stat
import threading

import pytest

from resflax import disk


@pytest.fixture
def synced(monkeypatch):
    """The files and directories that were brought to the disk, and the renames, in order."""
    fsync, replace = os.fsync, os.replace
    seen = []

    def record(descriptor):
        seen.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def rename(old, new):
        seen.append((str(old), str(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", rename)
    return seen


def test_a_file_has_its_bytes_before_its_name_and_then_the_directory_has_the_name(tmp_path, synced):
    path = tmp_path / "note.txt"
    disk.write(path, b"text")
    temporary = f"{tmp_path}/.note.txt.{os.getpid()}"
    assert synced == [temporary, (temporary, str(path)), str(tmp_path)]


def test_a_picture_waits_for_no_disk(tmp_path, synced):
    disk.write(tmp_path / "curves.png", b"PNG", durable=False)
    assert all(isinstance(entry, tuple) for entry in synced)


def test_a_directory_is_brought_to_the_disk_with_those_that_it_needed(tmp_path, synced):
    disk.make_directory(tmp_path / "sweep/run")
    assert synced == [str(tmp_path), str(tmp_path / "sweep")]
    disk.make_directory(tmp_path / "sweep/run")
    assert len(synced) == 2


def test_a_tree_is_brought_to_the_disk_with_every_file(tmp_path, synced):
    (tmp_path / "a/b").mkdir(parents=True)
    names = ["a/b/1", "a/2", "3"]
    for name in names:
        (tmp_path / name).write_text("")
    disk.sync_tree(tmp_path)
    assert set(synced) == {str(tmp_path / name) for name in (*names, "a", "a/b", "")}


def test_the_target_of_a_link_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere/table.csv", tmp_path / "table.csv"
    link.symlink_to(target)
    for text in (b"first", b"second"):  # of a new one, and of one that is there
        disk.write(link, text)
        assert target.read_bytes() == text
    assert link.is_symlink()
    assert os.listdir(tmp_path / "elsewhere") == ["table.csv"]


def test_a_device_stays_one(tmp_path):
    disk.write(tmp_path / "x", b"")
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    disk.write(link, b"text")
    assert stat.S_ISCHR(link.stat().st_mode)
    assert not [name for name in os.listdir("/dev") if name.startswith(".null")]


def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    disk.write(pipe, b"text")
    reader.join(10)
    assert read == [b"text"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_directory_is_no_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        disk.write(tmp_path / "folder", b"text")
    assert os.listdir(tmp_path) == ["folder"]


def test_what_does_not_fit_leaves_nothing_beside_the_old_file(tmp_path):
    path = tmp_path / "note.txt"
    disk.write(path, b"first")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # as a disk that gets full
    try:
        with pytest.raises(OSError, match="File too large"):
            disk.write(path, b"x" * 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [
        ("note.txt", b"first")
    ]
