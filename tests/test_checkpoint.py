import contextlib
import functools
import gc
import itertools
import os
import resource
import shutil
import subprocess

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from resflax.checkpoint import Checkpointer, CheckpointError, SaveError, store
from resflax.checkpoint import saver as saver_lib
from resflax.checkpoint.__main__ import main
from resflax.parallel import data_parallel
from resflax.train_state import create_train_state


class Linear(nn.Module):
    """The least network that has all a state has."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.BatchNorm(use_running_average=not train)(images.mean((1, 2)))
        return nn.Dense(3)(x)


def create(parallel, seed, ema=True):
    init = functools.partial(create_train_state, Linear(), optax.sgd(0.1, 0.9), (4, 4, 2), ema=ema)
    return parallel.create(init, seed)


def at(state, step):
    return state.replace(step=jnp.int32(step))


def parallel_of(mode, num_devices):
    return data_parallel(mode, jax.devices()[:num_devices])


def leaves(parallel, state):
    single = parallel.single(state).replace(key=jax.random.key_data(parallel.single(state).key))
    return jax.device_get(jax.tree.leaves(single))


@pytest.fixture
def collected():
    """What failed in orbax says so when it is collected: then, not in the output of other tests."""
    yield
    gc.collect()


def orbax_fails(test):
    """Marks a test in which threads of orbax wait for one that failed."""
    warnings = (
        "ignore::pytest.PytestUnraisableExceptionWarning",
        "ignore::pytest.PytestUnhandledThreadExceptionWarning",
    )
    return pytest.mark.usefixtures("collected")(pytest.mark.filterwarnings(*warnings)(test))


SOURCES = [("pmap", 1), ("shard_map", 2), ("jit", 4), ("pmap", 8)]
OTHERS = [("shard_map", 8), ("pmap", 4), ("jit", 2), ("shard_map", 1)]


# The first four have each of both once.
@pytest.mark.devices(8)
@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("source", "to", "ema"),
    [
        (SOURCES[i], OTHERS[(i + shift) % 4], (i % 2 == 0) == first)
        for first in (True, False)
        for shift in range(4)
        for i in range(4)
    ],
)
def test_a_state_moves_between_devices_and_modes(source, to, ema, tmp_path):
    source, to = (parallel_of(*layout) for layout in (source, to))
    state = create(source, seed=0, ema=ema)
    saver = Checkpointer(tmp_path, keep=1)
    saver.save(source.single(state), {"top1": 0.5})
    saver.close()
    loader = Checkpointer(tmp_path, keep=1)
    other = create(to, seed=1, ema=ema)
    restored = loader.restore_latest(to.single(other), to.replicated)
    loader.close()
    restored = to.spread(restored)
    for a, b in zip(leaves(source, state), leaves(to, restored), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(len(leaf.devices()) == to.num_devices for leaf in jax.tree.leaves(restored))


def test_the_next_step_may_overwrite_what_is_being_saved(tmp_path):
    parallel = data_parallel("jit", jax.devices()[:1])
    state = create(parallel, seed=0)
    expected = leaves(parallel, state)
    saver = Checkpointer(tmp_path, keep=1)
    saver.save(state)
    # As a step does that takes the state's memory for its result.
    jax.tree.map(lambda array: array.delete(), state)
    saver.close()
    loader = Checkpointer(tmp_path, keep=1)
    restored = loader.restore_latest(create(parallel, seed=1), parallel.replicated)
    loader.close()
    for a, b in zip(expected, leaves(parallel, restored), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_latest_and_the_best_are_kept(tmp_path):
    parallel = data_parallel("jit", jax.devices()[:1])
    state = create(parallel, seed=0)
    checkpointer = Checkpointer(tmp_path, keep=2)
    assert checkpointer.restore_latest(state, parallel.replicated) is None
    assert checkpointer.best is None
    for step, top1 in enumerate((0.1, 0.9, 0.3, 0.4, 0.5), start=1):
        checkpointer.save(at(state, step), {"top1": top1})
    checkpointer.wait()
    assert checkpointer.best == (2, 0.9)
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.is_dir())
    assert steps == [2, 4, 5]
    checkpointer.close()


@pytest.mark.long
def test_of_equals_the_latest_is_the_best_and_what_is_not_finite_never(tmp_path):
    parallel = data_parallel("jit", jax.devices()[:1])
    state = create(parallel, seed=0)

    def kept(saver):
        saver.wait()
        metrics = {s: store.read(tmp_path, s).metrics for s in store.steps(tmp_path)}
        return saver.best, store.best(metrics), list(metrics)

    with contextlib.closing(Checkpointer(tmp_path, keep=1)) as saver:
        saver.save(at(state, 1), {"top1": 0.9, "loss": float("nan")})
        assert kept(saver) == (None, None, [1])
        for step, top1 in enumerate((0.5, 0.8, 0.8, 0.2), start=2):
            saver.save(at(state, step), {"top1": top1, "loss": 0.1})
        assert kept(saver) == ((4, 0.8), 4, [4, 5])
        saver.save(at(state, 6), {"top1": 1.0, "loss": float("inf")})
        assert kept(saver) == ((4, 0.8), 4, [4, 6])
    # As in a run that goes on.
    with contextlib.closing(Checkpointer(tmp_path, keep=1)) as saver:
        saver.save(at(state, 7), {"top1": 0.8, "loss": 0.1})
        assert kept(saver) == ((7, 0.8), 7, [7])
        saver.save(at(state, 8), {"top1": 0.1, "loss": 0.1})
        assert kept(saver) == ((7, 0.8), 7, [7, 8])


@pytest.fixture
def two(tmp_path):
    """A run's directory with the states of steps 1 and 2."""
    parallel = parallel_of("jit", 1)
    state = create(parallel, seed=0)
    with contextlib.closing(Checkpointer(tmp_path, keep=5)) as saver:
        for step in (1, 2):
            params = jax.tree.map(lambda x, step=step: x + step, state.params)
            saver.save(at(state.replace(params=params), step), {"top1": 0.5})
    return tmp_path


def reopen(workdir):
    """What a run that goes on restores, and what it is told."""
    said = []
    parallel = parallel_of("jit", 1)
    with contextlib.closing(Checkpointer(workdir, keep=5, report=said.append)) as loader:
        restored = loader.restore_latest(create(parallel, seed=1), parallel.replicated)
        # The step after it can be saved.
        loader.save(at(restored, restored.step + 1), {"top1": 0.1})
    return restored, said


def damage(checkpoint):
    path = max(
        (p for p in (checkpoint / "variables").rglob("*") if p.is_file()), key=os.path.getsize
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def test_a_damaged_step_is_walked_back_from(two):
    path = damage(two / "checkpoints/2")
    state, (said,) = reopen(two)
    assert int(state.step) == 1
    assert f"the checkpoint of step 2 is damaged: {path} is not what was written" in said
    aside = two / "damaged_checkpoints/2"
    assert f"moved to {aside}; the run has step 1" in said
    assert (aside / path.relative_to(two / "checkpoints/2")).exists()
    assert store.steps(two) == [1, 2]


@pytest.mark.long
def test_an_older_damaged_step_is_set_aside_too(two):
    (two / "checkpoints/1/metrics/metrics").write_text("{")
    state, (said,) = reopen(two)
    assert int(state.step) == 2
    assert "step 1 is damaged" in said
    # What was set aside before stays.
    shutil.copytree(two / "checkpoints/3", two / "checkpoints/1")
    damage(two / "checkpoints/1")
    reopen(two)
    assert {path.name for path in (two / "damaged_checkpoints").iterdir()} == {"1", "1-2"}


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["7", "007"])
def test_a_directory_that_looks_like_a_step_is_none(two, name):
    (two / "checkpoints" / name).mkdir()
    (two / "checkpoints" / name / "mine.txt").write_text("mine")
    state, said = reopen(two)
    assert int(state.step) == 2
    if name == "7":
        assert "manifest.json is missing: the save was not finished" in said[0]
    assert [path.read_text() for path in two.rglob("mine.txt")] == ["mine"]


def test_what_an_interrupted_save_left_is_removed_and_named(two):
    left = two / "checkpoints/3.orbax-checkpoint-tmp"
    shutil.copytree(two / "checkpoints/2", left)
    state, (said,) = reopen(two)
    assert int(state.step) == 2
    assert said == f"{left} is removed: its save was interrupted."
    assert not left.exists()


class Killed(BaseException):
    """Where a process ends."""


@pytest.mark.parametrize(
    "call",
    [
        "unlink",
        pytest.param("rmdir", marks=pytest.mark.long),
        pytest.param("rename", marks=pytest.mark.long),
    ],
)
def test_a_deletion_that_is_cut_short_leaves_no_half_checkpoint(two, monkeypatch, call):
    real, calls = getattr(os, call), itertools.count()
    last = 0 if call == "rename" else 2

    def killed(*arguments, **settings):
        if next(calls) == last:
            raise Killed
        return real(*arguments, **settings)

    with monkeypatch.context() as broken:
        broken.setattr(os, call, killed)
        with pytest.raises(Killed):
            store.delete(two, 1)
    assert store.steps(two) == ([1, 2] if call == "rename" else [2])
    left = {path.name for path in (two / "checkpoints").iterdir()}
    assert left == ({"1", "2"} if call == "rename" else {"2", "deleted_1"})
    state, said = reopen(two)
    assert (int(state.step), said) == (2, [])
    assert not list((two / "checkpoints").glob("deleted*"))
    assert not (two / "damaged_checkpoints").exists()


def test_a_checkpoint_without_its_name_is_removed_and_named(two):
    left = two / "checkpoints/unfinished_3"
    shutil.copytree(two / "checkpoints/2", left)
    (two / "checkpoints/unfinished_notes").mkdir()
    state, (said,) = reopen(two)
    assert int(state.step) == 2
    assert said == f"{left} is removed: its save was interrupted."
    assert not left.exists()
    assert (two / "checkpoints/unfinished_notes").exists()


def test_a_checkpoint_that_is_a_link_is_deleted_and_its_target_stays(two):
    elsewhere = two / "elsewhere"
    (two / "checkpoints/1").rename(elsewhere)
    (two / "checkpoints/1").symlink_to(elsewhere)
    said = []
    parallel = parallel_of("jit", 1)
    with contextlib.closing(Checkpointer(two, keep=1, report=said.append)) as saver:
        saver.save(at(create(parallel, seed=0), 3), {"top1": 0.9})
    assert (store.steps(two), said) == ([3], [])
    assert (elsewhere / "manifest.json").exists()


def test_a_checkpoint_that_cannot_be_deleted_is_named_and_the_next_ones_are_saved(two, monkeypatch):
    def fail(folder):
        raise PermissionError(13, "Permission denied")

    said = []
    monkeypatch.setattr(shutil, "rmtree", fail)
    parallel = parallel_of("jit", 1)
    with contextlib.closing(Checkpointer(two, keep=1, report=said.append)) as saver:
        saver.save(at(create(parallel, seed=0), 3), {"top1": 0.9})
        saver.save(at(create(parallel, seed=0), 4), {"top1": 0.95})
    assert said == [
        f"the checkpoint of step {step} cannot be deleted: Permission denied." for step in (1, 2, 3)
    ]
    assert store.steps(two) == [4]


def test_where_all_are_damaged_nothing_is_touched(two):
    for step in (1, 2):
        damage(two / "checkpoints" / str(step))
    with pytest.raises(
        CheckpointError, match=r"all checkpoints in .* are damaged: .*step 2.*step 1"
    ):
        Checkpointer(two, keep=5)
    assert store.steps(two) == [1, 2]


def test_another_networks_state_is_refused_by_the_leafs_name(two):
    parallel = parallel_of("jit", 1)
    init = functools.partial(create_train_state, Linear(), optax.sgd(0.1, 0.9), (4, 4, 5), ema=True)
    with (
        contextlib.closing(Checkpointer(two, keep=5)) as loader,
        pytest.raises(
            CheckpointError, match=r"step 2 has ema/\S+/BatchNorm_0/\w+ as float32 \[2\]; "
        ),
    ):
        loader.restore_latest(parallel.create(init, 0), parallel.replicated)


@pytest.mark.long
def test_a_state_without_an_evaluation_is_kept_for_going_on(tmp_path):
    parallel = parallel_of("jit", 1)
    state = create(parallel, seed=0)
    with contextlib.closing(Checkpointer(tmp_path, keep=1)) as saver:
        saver.save(at(state, 1), {"top1": 0.5})
        saver.save(at(state, 2), {"top1": 0.4})
        saver.save(at(state, 3))
        saver.wait()
        assert saver.best == (1, 0.5)
        assert store.steps(tmp_path) == [1, 3]
        saver.save(at(state, 4), {"top1": 0.4})
    assert store.steps(tmp_path) == [1, 4]


@orbax_fails
def test_a_state_that_cannot_be_written_is_told_of(tmp_path):
    parallel = parallel_of("jit", 1)
    state = create(parallel, seed=0)
    saver = Checkpointer(tmp_path, keep=5)
    saver.save(at(state, 1), {"top1": 0.5})
    saver.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # no file may have a byte
    try:
        saver.save(at(state, 2), {"top1": 0.5})
        with pytest.raises(SaveError, match="step 2 could not be saved"):
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    saver.save(at(state, 3), {"top1": 0.5})
    saver.close()
    assert store.steps(tmp_path) == [1, 3]
    restored, _ = reopen(tmp_path)
    assert int(restored.step) == 3


def test_a_save_that_fails_in_its_thread_is_told_of(tmp_path, monkeypatch):
    # As where not even a directory can be made.
    def fail(*arguments, **settings):
        raise OSError("no inode is left")

    parallel = parallel_of("jit", 1)
    with contextlib.closing(Checkpointer(tmp_path, keep=5)) as saver:
        with monkeypatch.context() as broken:
            broken.setattr(ocp.CheckpointManager, "save", fail)
            saver.save(at(create(parallel, seed=0), 1), {"top1": 0.5})
            with pytest.raises(SaveError, match="step 1 could not be saved: no inode is left"):
                saver.wait()
        saver.save(at(create(parallel, seed=0), 2), {"top1": 0.5})
    assert store.steps(tmp_path) == [2]


@pytest.fixture
def small_disk(tmp_path):
    """A file system that has room for a few checkpoints of the least network."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.first(1)
@orbax_fails
@pytest.mark.parametrize("known", [True, False])
def test_a_full_disk_keeps_what_is_there(small_disk, monkeypatch, known):
    parallel = parallel_of("jit", 1)
    state = create(parallel, seed=0)
    said = []
    saver = Checkpointer(small_disk, keep=5, unsaved=said.append)
    saver.save(at(state, 1), {"top1": 0.5})
    saver.wait()
    assert not said
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 512)
    if not known:  # as where another program is quicker
        usage = shutil.disk_usage(small_disk)._replace(free=2**30)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    saver.save(at(state, 2), {"top1": 0.5})
    saver.wait()
    (text,) = said
    assert "state of step 2" in text
    assert text.endswith("The run goes on.")
    assert "\n" not in text
    # When there is room again, it goes on.
    filler.unlink()
    saver.save(at(state, 3), {"top1": 0.5})
    saver.close()
    assert len(said) == 1
    assert store.steps(small_disk) == [1, 3]
    restored, _ = reopen(small_disk)
    assert int(restored.step) == 3
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 512 if known else 0))
    if known:
        with pytest.raises(SaveError, match="the same command goes on"):
            Checkpointer(small_disk, keep=5).save(at(state, 9), {"top1": 0.5})


def test_the_command_lists_verifies_and_prunes(two, capsys):
    parallel = parallel_of("jit", 1)
    with contextlib.closing(Checkpointer(two, keep=5)) as saver:
        saver.save(at(create(parallel, seed=0), 3), {"top1": 0.25})
    assert main(["list", str(two)]) == 0
    output = capsys.readouterr().out
    assert "50.00% best" in output
    assert "25.00%" in output
    assert main(["verify", str(two)]) == 0
    assert "3 of 3 checkpoints are good" in capsys.readouterr().out
    path = damage(two / "checkpoints/1")
    assert main(["verify", str(two)]) == 1
    assert f"checkpoints/1: DAMAGED: {path} is not what was written" in capsys.readouterr().out
    (two / "checkpoints/4").mkdir()
    (two / "checkpoints/4/mine.txt").write_text("mine")
    assert main(["prune", str(two)]) == 1
    assert "step 1 deleted" in capsys.readouterr().out
    assert store.steps(two) == [2, 3, 4]
    with pytest.raises(SystemExit) as exit_code:
        main(["verify", str(two / "checkpoints")])
    assert exit_code.value.code == 2
    assert "has no checkpoint" in capsys.readouterr().err


def test_skipped_updates_are_counted_over_all_starts(tmp_path):
    parallel = parallel_of("jit", 1)
    state = create(parallel, seed=0).replace(skipped=jnp.int32(3))
    with contextlib.closing(Checkpointer(tmp_path, keep=5)) as saver:
        saver.save(at(state, 1), {"top1": 0.5})
    restored, _ = reopen(tmp_path)
    assert int(restored.skipped) == 3


def test_a_state_of_the_first_version_has_skipped_nothing(tmp_path, monkeypatch):
    def items(state, new=saver_lib._items):
        found = new(state)
        del found["optimizer"]["skipped"]
        return found

    parallel = parallel_of("jit", 1)
    state = create(parallel, seed=0).replace(skipped=jnp.int32(3))
    with monkeypatch.context() as old:
        old.setattr(saver_lib, "_items", items)
        with contextlib.closing(Checkpointer(tmp_path, keep=5)) as saver:
            saver.save(at(state, 1), {"top1": 0.5})
    with contextlib.closing(Checkpointer(tmp_path, keep=5)) as loader:
        restored = loader.restore_latest(state, parallel.replicated)
    assert (int(restored.step), int(restored.skipped)) == (1, 0)
