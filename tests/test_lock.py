"""Tests of the lock on a sweep's directory, with other processes that hold it."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from launch import lock

ROOT = pathlib.Path(__file__).parent.parent

# Takes the lock of a directory, starts a child that inherits it, and says the child's number.
HOLDER = """
import pathlib, subprocess, sys, time
from launch import lock
with lock.held(pathlib.Path(sys.argv[1])) as descriptor:
    child = subprocess.Popen(["sleep", "100"], pass_fds=[descriptor], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    time.sleep(100)
"""


def is_free(directory):
    try:
        with lock.held(directory):
            return True
    except lock.LockError:
        return False


def wait_until_free(directory):
    deadline = time.monotonic() + 20
    while not is_free(directory) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_free(directory)


def refusal(directory):
    with pytest.raises(lock.LockError) as error, lock.held(directory):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_directory_is_made_and_the_descriptor_is_that_of_the_lock(tmp_path):
    directory = tmp_path / "sweeps" / "depth"
    with lock.held(directory) as descriptor:
        assert [path.name for path in directory.iterdir()] == [lock.LOCK]
        assert os.path.samestat(os.fstat(descriptor), (directory / lock.LOCK).stat())


def test_a_second_sweep_is_refused_until_the_first_has_ended(tmp_path):
    with lock.held(tmp_path):
        assert refusal(tmp_path) == (
            f"--workdir {tmp_path}: another sweep, or a run that one left behind, is at work "
            "there; wait for its end, or take another directory."
        )
        assert not is_free(tmp_path)  # a refusal frees nothing
        assert is_free(tmp_path / "other")
    assert is_free(tmp_path)


def test_a_sweep_that_fails_frees_the_directory(tmp_path):
    with pytest.raises(KeyError, match="lost"), lock.held(tmp_path):
        raise KeyError("lost")
    assert is_free(tmp_path)


def test_the_lock_goes_with_the_last_process_that_has_inherited_it(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with holder:
        child = int(holder.stdout.readline())
        try:
            assert "another sweep" in refusal(tmp_path)
        finally:
            holder.kill()
    try:
        assert not is_free(tmp_path)
    finally:
        os.kill(child, 9)
    wait_until_free(tmp_path)


def test_where_there_can_be_no_directory_it_is_said(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert refusal(file) == f"--workdir {file}: File exists."
    assert refusal(file / "sweep") == f"--workdir {file}/sweep: Not a directory."
    (tmp_path / "taken" / lock.LOCK).mkdir(parents=True)
    assert refusal(tmp_path / "taken") == f"--workdir {tmp_path}/taken: Is a directory."
    assert file.read_text() == "mine"
