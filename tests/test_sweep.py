"""Sweeps as a user starts them: real runs in processes of their own."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import forked
import pytest

from launch import lock, sweep

ROOT = pathlib.Path(__file__).parent.parent

# A run that cannot be, and one that is quick to compile.
CONFIG = """
from tests.plain import get_config

def sweep():
    for lr in (-1.0, 0.1):
        yield {"optim.lr": lr}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(CONFIG)
    return path


def start(config, workdir, *options):
    command = [sys.executable, "-m", "launch.sweep", "--config", str(config)]
    return subprocess.Popen(
        [*command, "--workdir", str(workdir), *options],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": forked.xla_flags(), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    try:
        output, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # it stops its runs
        process.communicate()
        raise
    return process.returncode, output, errors


def wait_for(path):
    deadline = time.monotonic() + 200
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.exists()


def processes_of(workdir):
    """The processes that are at work in a directory, by their command lines."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"resflax.main" in command and any(str(workdir).encode() in word for word in command):
            found.append(int(process.name))
    return found


def contents(directory):
    return {
        path: path.stat().st_mtime_ns
        for path in directory.rglob("*")
        if path.is_file() and path.name != lock.LOCK
    }


@pytest.fixture(scope="module")
def swept(config, tmp_path_factory):
    """A sweep of one epoch, both runs at a time."""
    workdir = tmp_path_factory.mktemp("swept") / "sweep"
    options = ("--parallel", "2", "--override", "train.epochs=1")
    return workdir, options, finish(start(config, workdir, *options))


@pytest.mark.long
def test_a_failed_run_does_not_stop_the_others(swept):
    workdir, _, (code, output, errors) = swept
    assert code == 1, errors
    top1 = json.loads((workdir / "lr=0.1/result.json").read_text())["eval/top1"]
    assert f"lr=0.1: done, top-1 {top1:.2%}\n" in output
    assert not (workdir / "lr=0.1/error.txt").exists()
    assert not (workdir / "lr=-1.0/result.json").exists()
    assert "lr=-1.0: failed: config.optim.lr -1.0 must be at least 0." in output
    assert "1 of 2 done, 1 failed" in output.splitlines()[-1]


@pytest.mark.long
def test_a_run_leaves_its_output_and_its_error(swept):
    workdir, _, _ = swept
    assert "eval loss" in (workdir / "lr=0.1/log.txt").read_text()
    error = "config.optim.lr -1.0 must be at least 0.\n"
    assert (workdir / "lr=-1.0/error.txt").read_text() == error
    assert (workdir / "lr=-1.0/log.txt").read_text() == f"error: {error}"


@pytest.mark.long
def test_the_same_command_starts_what_is_not_finished(config, swept):
    workdir, options, _ = swept
    before = contents(workdir / "lr=0.1")
    code, output, _ = finish(start(config, workdir, *options))
    assert code == 1
    assert "lr=0.1: running" not in output
    assert contents(workdir / "lr=0.1") == before
    assert (workdir / "lr=-1.0/log.txt").read_text().count("must be at least 0.") == 2


@pytest.mark.long
def test_finished_runs_are_enough(config, swept):
    workdir, options, _ = swept
    code, output, _ = finish(start(config, workdir, *options, "--filter", "optim.lr=0.1"))
    assert code == 0
    assert "1 of 1 done" in output


@pytest.mark.long
def test_the_runs_of_another_config_are_left_alone(config, swept):
    workdir, _, _ = swept
    before = contents(workdir / "lr=0.1")
    options = ("--override", "train.epochs=3", "--filter", "optim.lr=0.1")
    code, output, _ = finish(start(config, workdir, *options))
    assert code == 1
    assert "another config (train.epochs: 1.0 -> 3.0)" in output
    assert contents(workdir / "lr=0.1") == before


ENDLESS = ("--override", "train.epochs=1000", "--filter", "optim.lr=0.1")


def stop(config, workdir, number, step):
    """Stops a sweep of one run by a signal, after a checkpoint; returns the run's output."""
    process = start(config, workdir, *ENDLESS)
    wait_for(workdir / f"lr=0.1/checkpoints/{step}")
    process.send_signal(number)
    code, output, errors = finish(process)
    assert code == 130
    assert "stopped with 0 of 1 runs done; the same command goes on." in errors
    assert "1 interrupted" in output
    assert not processes_of(workdir)
    assert not (workdir / "lr=0.1/error.txt").exists()
    return (workdir / "lr=0.1/log.txt").read_text()


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(config, tmp_path):
    assert "resumed" not in stop(config, tmp_path, signal.SIGINT, step=2)
    done = max(int(path.name) for path in (tmp_path / "lr=0.1/checkpoints").glob("[0-9]*"))
    # It was saved where it was stopped; from there on every second step is, as before.
    log = stop(config, tmp_path, signal.SIGINT, step=done + 2 - done % 2)
    assert f"resumed after step {done} of 2000" in log


@pytest.mark.slow
def test_a_terminated_sweep_stops_its_runs(config, tmp_path):
    stop(config, tmp_path, signal.SIGTERM, step=2)


@pytest.mark.slow
def test_a_sweep_is_not_begun_beside_the_runs_of_a_killed_one(config, tmp_path, capsys):
    process = start(config, tmp_path, *ENDLESS)
    wait_for(tmp_path / "lr=0.1/checkpoints/2")
    process.kill()
    process.communicate()
    (run,) = processes_of(tmp_path)
    arguments = ["--config", str(config), "--workdir", str(tmp_path), *ENDLESS]
    with pytest.raises(SystemExit) as exit_code:
        sweep.main(arguments)
    assert exit_code.value.code == 2
    assert "another sweep, or a run that one left behind, is at work" in capsys.readouterr().err
    os.kill(run, signal.SIGKILL)
    code, output, _ = finish(start(config, tmp_path, *ENDLESS, "--executor", "print"))
    assert code == 0
    assert "optim.lr=0.1" in output
    with lock.held(tmp_path):  # free again: the print's start took longer than the run's end
        pass


@pytest.mark.slow
def test_another_seed_compiles_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    options = ("--filter", "optim.lr=0.1", "--seeds", "0,1", "--override", "train.epochs=1")
    code, _, errors = finish(start(config, tmp_path / "sweep", *options))
    assert (code, errors) == (0, "")
    logs = [path.read_text() for path in sorted(tmp_path.glob("sweep/*/log.txt"))]
    assert [log.count(" 0 read from the cache") for log in logs] == [1, 0]
    assert [log.count("programs: 0 compiled") for log in logs] == [0, 1]


def test_two_sweeps_in_one_directory_are_one_too_many(config, tmp_path, capsys):
    arguments = ["--config", str(config), "--workdir", str(tmp_path)]
    with lock.held(tmp_path), pytest.raises(SystemExit) as exit_code:
        sweep.main(arguments)
    assert exit_code.value.code == 2
    assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK]


PRINT = ["--executor", "print", "--override", "train.epochs=1"]


def test_commands_are_printed_one_a_line(config, tmp_path, capsys):
    arguments = ["--config", str(config), "--workdir", str(tmp_path / "new"), *PRINT]
    assert sweep.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert f"--config {config} --config.optim.lr=0.1 --config.train.epochs=1" in lines[1]
    assert lines[1].endswith(f"--workdir {tmp_path}/new/lr=0.1")
    assert not (tmp_path / "new").exists()


@pytest.mark.long
def test_the_command_of_a_finished_run_is_not_printed(config, swept, capsys):
    workdir, _, _ = swept
    assert sweep.main(["--config", str(config), "--workdir", str(workdir), *PRINT]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "optim.lr=-1.0" in line


@pytest.mark.parametrize(
    ("options", "right"),
    [
        (["--config", "nothing.py"], "there is no file nothing.py"),
        (["--config", "tests/small.py"], "small.py has no sweep()"),
        (["--seeds", "0,1,x"], "--seeds: '0,1,x' must be integers, such as 0,1,2"),
        (["--seeds", "0,1,0"], "--seeds: '0,1,0' has one twice"),
        (["--filter", "optim.lr"], "--filter: 'optim.lr' must be FIELD=VALUE"),
        (["--override", "optim.rl=1"], "the config has no field 'rl'"),
        (["--parallel", "0"], "--parallel 0 must be at least 1"),
        (["--executor", "moon"], "invalid choice: 'moon'"),
        (["--executor", "print", "--parallel", "2"], "unrecognized arguments: --parallel 2"),
        (["--workdir", "pyproject.toml"], "pyproject.toml: File exists"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    config, tmp_path, monkeypatch, capsys, options, right
):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_code:
        sweep.main(["--config", str(config), "--workdir", str(tmp_path / "new"), *options])
    assert exit_code.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert right in errors
    assert not (tmp_path / "new").exists()
