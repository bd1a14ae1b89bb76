"""A power cut leaves of a run a good state, not older than the one before the last.

Whoever may mount file systems looks at the disk itself; for everybody, the order in which the files
are brought to it is recorded.
"""

import contextlib
import filecmp
import hashlib
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time

import forked
import pytest
from test_checkpoint import at, create, parallel_of

from resflax.checkpoint import Checkpointer, store

CUTS = 10  # of each case


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


@pytest.fixture
def events(monkeypatch):
    """What is brought to the disk, with its contents then, renamed and removed, in order."""
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree
    seen = []

    def record_fsync(descriptor):
        path = pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append(("fsync", path, digest(path)))
        fsync(descriptor)

    def record_rename(old, new):
        seen.append(("rename", pathlib.Path(old), pathlib.Path(new)))
        rename(old, new)

    def record_rmtree(path, *arguments, **settings):
        seen.append(("rmtree", pathlib.Path(path), None))
        rmtree(path, *arguments, **settings)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(shutil, "rmtree", record_rmtree)
    return seen


def test_a_state_is_on_the_disk_before_it_has_its_name_and_the_old_one_goes_after_that(
    tmp_path, events
):
    state = create(parallel_of("jit", 1), seed=0)
    (tmp_path / "metrics.jsonl").write_text("lines\n")
    with contextlib.closing(Checkpointer(tmp_path, keep=1)) as saver:
        saver.save(at(state, 1), {"top1": 0.1})
        saver.wait()
        events.clear()
        saver.save(at(state, 2), {"top1": 0.2})
    folder = store.directory(tmp_path)
    named = events.index(("rename", folder / "unfinished_2", folder / "2"))
    before = {(path.name, contents) for kind, path, contents in events[:named] if kind == "fsync"}
    for path in (folder / "2").rglob("*"):  # with the bytes that it has now
        assert (path.name, digest(path)) in before, path
    assert ("metrics.jsonl", digest(tmp_path / "metrics.jsonl")) in before
    # The name, then that the old one has none, then its files.
    assert events[named + 1 :] == [
        ("fsync", folder, ""),
        ("rename", folder / "1", folder / "deleted_1"),
        ("fsync", folder, ""),
        ("rmtree", folder / "deleted_1", None),
    ]


@contextlib.contextmanager
def mounted(image, folder):
    """A file system in a file: its journal is played back, as after a power cut."""
    folder.mkdir(exist_ok=True)
    # It notes names every second, and never bytes for their sake.
    options = "loop,commit=1,noauto_da_alloc"
    mount = ["mount", "-t", "ext4", "-o", options, str(image), str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def cut(process, image, workdir, copy):
    """Copies the disk of a process at one moment; returns the last step that has a name then."""
    process.send(signal.SIGSTOP)
    try:
        last = max(store.steps(workdir))
        while True:  # until nothing was written meanwhile
            shutil.copyfile(image, copy)
            if filecmp.cmp(image, copy, shallow=False):
                return last
    finally:
        process.send(signal.SIGCONT)


def resumed(workdir, flags):
    """The step after which a run goes on, and what it says until then."""
    process = forked.Process("resflax.main", *flags, "--workdir", workdir)
    lines = workdir / "metrics.jsonl"
    size = lines.stat().st_size if lines.exists() else 0
    while not process.ended and not (lines.exists() and lines.stat().st_size > size):
        time.sleep(0.05)
    if not process.ended:
        process.send(signal.SIGTERM)
    result = process.finish()
    assert result.code == 143, result
    found = re.search(r"resumed after step (\d+)", result.output)
    return int(found[1]) if found else 0, result.output


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 2])
def test_a_power_cut_leaves_a_good_state(tmp_path, keep):
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("there is no mkfs.ext4")
    every = 10  # epochs of two steps
    flags = ["--config", "tests/plain.py", "--config.train.epochs=100000"]
    flags += [f"--config.{group}.every_epochs={every}" for group in ("eval", "checkpoint")]
    flags += [f"--config.checkpoint.keep={keep}"]
    seed = time.time_ns()
    print(f"seed {seed}")
    rng = random.Random(seed)
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(64 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    latest = []
    with mounted(image, tmp_path / "live") as live:
        workdir = live / "run"
        process = forked.Process("resflax.main", *flags, "--workdir", workdir)
        process.wait_for(workdir / "checkpoints" / str(4 * every))
        for number in range(CUTS):
            before = max(store.steps(workdir))
            while max(store.steps(workdir)) == before:
                assert not process.ended, process.finish()
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 2))
            latest.append(cut(process, image, workdir, tmp_path / f"cut{number}"))
        process.send(signal.SIGKILL)
        process.finish()
    for number, last in enumerate(latest):
        with mounted(tmp_path / f"cut{number}", tmp_path / "after") as after:
            step, output = resumed(after / "run", flags)
        print(f"cut {number}: the last state was of step {last}, the run went on from {step}")
        assert step >= last - 2 * every
        assert "damaged" not in output
        (tmp_path / f"cut{number}").unlink()
