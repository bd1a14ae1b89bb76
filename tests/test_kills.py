"""A process that is killed again and again comes to the parameters of an undisturbed one."""

import multiprocessing
import os
import pathlib
import random
import signal
import sys
import time

import jax
import numpy as np
import pytest
from small import config as small_config

import resflax
from resflax.checkpoint import store

pytestmark = pytest.mark.once

# All that could go wrong: averages, dropout, stochastic depth, mixup, augmentation, momentum.
CONFIG = {
    "model.name": "cifar_resnet20",
    "model.depth": 8,
    "model.num_filters": 4,
    "model.cardinality": None,
    "model.base_width": None,
    "model.se_reduction": None,
    "train.ema_decay": 0.9,
    "model.dropout": 0.2,
    "model.drop_path": 0.2,
    "mix.mixup": 0.4,
    "optim.warmup_epochs": 1.0,
}


def run(workdir: pathlib.Path, overrides: dict[str, object]) -> None:
    """In a process of its own, with its output in a file."""
    from resflax import interruption, runtime, train

    runtime.configure()
    log = os.open(workdir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout.reconfigure(line_buffering=True)
    try:
        train.train_and_evaluate(small_config(**overrides), workdir)
    except interruption.Stopped as stop:
        sys.exit(stop.exit_code)


@pytest.fixture(scope="module")
def start():
    """Starts the run, on one device, in a process that has imported the libraries before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resflax.train", "small"])

    def start(workdir, overrides):
        process = context.Process(target=run, args=(workdir, overrides))
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")
        yield start


def whole(start, workdir, overrides):
    """The run in one go."""
    process = start(workdir, overrides)
    process.join(300)
    assert process.exitcode == 0, workdir.with_suffix(".log").read_text()


def disturbed(start, workdir, overrides, number, times):
    """The run with a signal so often, at random moments of its training, which then may end."""
    seed = time.time_ns()
    print(f"seed {seed}")
    rng = random.Random(seed)
    metrics = workdir / "metrics.jsonl"
    # A kill leaves what the run has saved; SIGTERM has it save.
    saves = number == signal.SIGTERM
    for _ in range(times):
        process = start(workdir, overrides)
        size = metrics.stat().st_size if metrics.exists() else 0
        while process.is_alive() and not (
            metrics.exists() and metrics.stat().st_size > size and (saves or store.steps(workdir))
        ):
            time.sleep(0.005)
        process.join(rng.uniform(0, 0.5))
        assert process.exitcode is None, workdir.with_suffix(".log").read_text()
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == (143 if saves else -signal.SIGKILL)
    whole(start, workdir, overrides)
    return workdir.with_suffix(".log").read_text()


def assert_same(a, b):
    a, b = resflax.restore(a), resflax.restore(b)
    assert a.step == b.step
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)


@pytest.mark.parametrize(
    ("placement", "kills", "epochs"),
    [
        ("auto", 10, 20.0),
        pytest.param("device", 25, 60.0, marks=pytest.mark.slow),
        pytest.param("host", 25, 60.0, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_gives_the_same_bits(start, tmp_path, placement, kills, epochs):
    overrides = CONFIG | {"data.placement": placement, "train.epochs": epochs}
    whole(start, tmp_path / "whole", overrides)
    log = disturbed(start, tmp_path / "killed", overrides, signal.SIGKILL, kills)
    print(f"{log.count('its save was interrupted')} of {kills} kills interrupted a save")
    assert log.count("resumed after step") >= kills - 1
    assert "damaged" not in log
    assert_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_run_that_is_preempted_all_day_loses_no_step(start, tmp_path):
    """Twenty preemptions within two minutes; only they save anything on the way."""
    overrides = CONFIG | {"train.epochs": 1000.0}
    overrides |= {"eval.every_epochs": 900, "checkpoint.every_epochs": 900}
    whole(start, tmp_path / "whole", overrides)
    log = disturbed(start, tmp_path / "stopped", overrides, signal.SIGTERM, 20)
    assert log.count("resumed after step") == 20
    assert_same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_memory_and_open_files_stay_what_they_are(start, tmp_path):
    overrides = CONFIG | {"train.epochs": 1000.0, "log.every_steps": 20}  # 2,000 steps
    overrides |= {"eval.every_epochs": 10, "checkpoint.every_epochs": 10}
    process = start(tmp_path / "run", overrides)
    seen = {}
    while process.is_alive():
        lines = tmp_path / "run/metrics.jsonl"
        step = 20 * lines.read_text().count("train/loss") if lines.exists() else 0
        status = pathlib.Path(f"/proc/{process.pid}")
        try:
            pages = int((status / "statm").read_text().split()[1])
            seen[step] = pages, len(list((status / "fd").iterdir()))
        except OSError:
            break
        time.sleep(0.2)
    process.join()
    assert process.exitcode == 0
    early = [seen[step] for step in seen if 400 <= step <= 800]
    late = [seen[step] for step in seen if 1600 <= step <= 2000]
    assert max(pages for pages, _ in late) < 1.05 * max(pages for pages, _ in early)
    # At least: a save that is under way has some open.
    assert min(files for _, files in late) <= min(files for _, files in early)
