"""A process that is killed again and again comes to the parameters of an undisturbed one."""

import os
import pathlib
import random
import signal
import time

import forked
import jax
import numpy as np
import pytest

import resflax
from resflax.checkpoint import store
from resflax.run import workdir as workdir_lib

# All that could go wrong: averages, dropout, stochastic depth, mixup, augmentation, momentum.
FLAGS = (
    "--config.train.ema_decay=0.9",
    "--config.model.dropout=0.2",
    "--config.model.drop_path=0.2",
    "--config.mix.mixup=0.4",
    "--config.optim.warmup_epochs=1",
)


def start(workdir, *flags):
    command = ("--config", "tests/plain.py", *FLAGS, *flags, "--workdir", workdir)
    return forked.Process("resflax.main", *command)


def whole(workdir, *flags):
    """The output of the run in one go."""
    result = start(workdir, *flags).finish(300)
    assert result.code == 0, result.errors
    return result.output


def disturbed(workdir, flags, number, times):
    """The output of the run with a signal so often, at random moments of its training."""
    seed = time.time_ns()
    print(f"seed {seed}")
    rng = random.Random(seed)
    metrics = workdir / "metrics.jsonl"
    outputs = []
    # A kill leaves what the run has saved; SIGTERM has it save.
    saves = number == signal.SIGTERM
    for _ in range(times):
        process = start(workdir, *flags)
        size = metrics.stat().st_size if metrics.exists() else 0
        while not process.ended and not (
            metrics.exists() and metrics.stat().st_size > size and (saves or store.steps(workdir))
        ):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.5))
        assert not process.ended, process.finish()
        process.send(number)
        result = process.finish(60)
        assert result.code == (143 if saves else -signal.SIGKILL), result.errors
        outputs.append(result.output)
    return "".join(outputs) + whole(workdir, *flags)


def every(epochs):
    """Evaluations and checkpoints so many epochs apart."""
    return (f"--config.eval.every_epochs={epochs}", f"--config.checkpoint.every_epochs={epochs}")


def assert_same(a, b):
    a, b = resflax.restore(a), resflax.restore(b)
    assert a.step == b.step
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)


@pytest.mark.parametrize(
    ("placement", "kills", "epochs"),
    [
        pytest.param("auto", 10, 60, marks=pytest.mark.slow),
        pytest.param("device", 25, 60, marks=pytest.mark.slow),
        pytest.param("host", 25, 60, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_gives_the_same_bits(tmp_path, placement, kills, epochs):
    flags = (f"--config.data.placement={placement}", f"--config.train.epochs={epochs}")
    whole(tmp_path / "whole", *flags)
    log = disturbed(tmp_path / "killed", flags, signal.SIGKILL, kills)
    print(f"{log.count('its save was interrupted')} of {kills} kills interrupted a save")
    assert log.count("resumed after step") >= kills - 1
    assert "damaged" not in log
    assert_same(tmp_path / "whole", tmp_path / "killed")


def killed_in(process, folder, name, times):
    """Kills a process in a save or a deletion: so many of them later; what is left of it."""
    seen, found = 0, set(os.listdir(folder))  # with what the kill before has left
    while seen < times:
        before, found = found, {p for p in os.listdir(folder) if p.startswith(name)}
        seen += bool(found - before)
        assert not process.ended, process.finish()
        time.sleep(0.0005)
    time.sleep(random.uniform(0, 0.02) if name == "unfinished" else 0)
    process.send(signal.SIGKILL)
    result = process.finish(60)
    assert result.code == -signal.SIGKILL, result
    return result.output, [p for p in os.listdir(folder) if p.startswith(("unfinished", "deleted"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unfinished", "deleted"])
def test_kills_in_saves_and_in_deletions_give_the_same_bits(tmp_path, name):
    """A checkpoint is saved, and another one deleted, every two steps."""
    flags = ("--config.train.epochs=60", *every(1))
    whole(tmp_path / "whole", *flags)
    workdir = tmp_path / "killed"
    (workdir / "checkpoints").mkdir(parents=True)
    workdir_lib.write_atomically(
        workdir / "config.json", (tmp_path / "whole/config.json").read_text()
    )
    log, left, kills = "", [], 15
    for _ in range(kills):
        process = start(workdir, *flags)
        output, names = killed_in(process, workdir / "checkpoints", name, random.randint(1, 3))
        log += output
        left += names
    log += whole(workdir, *flags)
    print(f"{len(left)} of {kills} kills left something of a save or a deletion: {left}")
    assert "damaged" not in log
    assert all(path.name.isdecimal() for path in (workdir / "checkpoints").iterdir())
    assert_same(tmp_path / "whole", workdir)


@pytest.mark.slow
def test_a_run_that_is_preempted_all_day_loses_no_step(tmp_path):
    """Twenty preemptions within two minutes; only they save anything on the way."""
    flags = ("--config.train.epochs=1000", *every(900))
    whole(tmp_path / "whole", *flags)
    log = disturbed(tmp_path / "stopped", flags, signal.SIGTERM, 20)
    assert log.count("resumed after step") == 20
    assert_same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_memory_and_open_files_stay_what_they_are(tmp_path):
    # 2,000 steps.
    flags = ("--config.train.epochs=1000", "--config.log.every_steps=20", *every(10))
    process = start(tmp_path / "run", *flags)
    seen = {}
    while not process.ended:
        lines = tmp_path / "run/metrics.jsonl"
        step = 20 * lines.read_text().count("train/loss") if lines.exists() else 0
        status = pathlib.Path(f"/proc/{process.pid}")
        try:
            pages = int((status / "statm").read_text().split()[1])
            seen[step] = pages, len(list((status / "fd").iterdir()))
        except OSError:
            break
        time.sleep(0.2)
    assert process.finish().code == 0
    early = [seen[step] for step in seen if 400 <= step <= 800]
    late = [seen[step] for step in seen if 1600 <= step <= 2000]
    assert max(pages for pages, _ in late) < 1.05 * max(pages for pages, _ in early)
    # At least: a save that is under way has some open.
    assert min(files for _, files in late) <= min(files for _, files in early)
