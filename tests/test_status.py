import json

import pytest

from launch import status
from launch.runs import Run
from launch.status import State, Status
from resflax.run import workdir as workdir_lib


@pytest.fixture
def run(tmp_path):
    return Run("lr=0.1", "tests/small.py", {"optim.lr": 0.1}, tmp_path / "lr=0.1")


def start(run, *lines):
    """What a run leaves that has begun."""
    workdir_lib.open_run(run.workdir, run.resolve())
    (run.workdir / "metrics.jsonl").write_text("".join(lines))


def line(**metrics):
    return json.dumps({"step": 1, **metrics}) + "\n"


LINES = (
    line(epoch=0.5, **{"train/top1": 0.9}),
    line(epoch=1.0, **{"eval/top1": 0.25}),
    line(epoch=1.5, **{"train/top1": 0.9}),
)


def test_a_run_that_has_not_begun_is_queued(run):
    assert status.read(run) == Status(State.QUEUED, epochs=2.0)


def test_a_run_without_a_result_was_interrupted(run):
    start(run, *LINES)
    assert status.read(run) == Status(State.INTERRUPTED, 1.5, 2.0, 0.25)


def test_a_half_written_line_is_left_out(run):
    start(run, *LINES, line(epoch=2.0, **{"eval/top1": 0.5})[:-1])
    assert status.read(run) == Status(State.INTERRUPTED, 1.5, 2.0, 0.25)


def test_a_result_is_the_mark_of_a_finished_run(run):
    start(run, *LINES)
    workdir_lib.write_result(run.workdir, {"eval/top1": 0.75, "best/top1": 0.75, "seconds": 1.0})
    (run.workdir / "error.txt").write_text("of an earlier start\n")
    assert status.read(run) == Status(State.DONE, 2.0, 2.0, 0.75)


def test_a_result_that_cannot_be_read_is_none(run):
    start(run)
    (run.workdir / "result.json").write_text("{")
    assert status.read(run).state is State.INTERRUPTED


def test_an_error_is_told(run):
    start(run, *LINES)
    (run.workdir / "error.txt").write_text("the loss of step 3 is nan\n")
    assert status.read(run) == Status(State.FAILED, 1.5, 2.0, 0.25, "the loss of step 3 is nan")


@pytest.mark.parametrize("result", [False, True])
def test_the_run_of_another_config_is_not_this_one(run, result):
    start(Run(run.name, run.config, {"optim.lr": 0.2}, run.workdir))
    if result:
        workdir_lib.write_result(
            run.workdir, {"eval/top1": 0.75, "best/top1": 0.75, "seconds": 1.0}
        )
    now = status.read(run)
    assert now.state is State.FAILED
    assert now.error == f"{run.workdir} holds a run with another config (optim.lr: 0.2 -> 0.1)."


def test_a_damaged_config_is_named(run):
    run.workdir.mkdir()
    (run.workdir / "config.json").write_text("{")
    assert f"{run.workdir / 'config.json'}: not a config of resflax" in status.read(run).error


OUTPUT = """Traceback (most recent call last):
  File "main.py", line 3, in main
    raise ValueError("first")
ValueError: first

During handling of the above exception, another exception occurred:

  File "main.py", line 5, in main
jaxlib._jax.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.
--------------------
For simplicity, JAX has removed its internal frames from the traceback of the following exception.
"""


@pytest.mark.parametrize(
    ("output", "code", "error"),
    [
        (
            OUTPUT,
            1,
            "jaxlib._jax.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.",
        ),
        (
            "epoch 1\nerror: lr -1.0 must be at least 0.\nE0000 C++ log\n",
            2,
            "lr -1.0 must be at least 0.",
        ),
        ("sh: python: not found\n\n", 127, "sh: python: not found"),
        ("", 3, "ended with code 3"),
        (OUTPUT, -9, "was ended by SIGKILL"),
    ],
)
def test_the_last_error_is_the_line_that_says_what_went_wrong(output, code, error):
    assert status.last_error(output, code) == error
