"""How far a run is, from the files in its directory."""

import dataclasses
import enum
import json
import os
import pathlib
import re

from launch import signals
from launch.runs import Run
from resflax import config as config_lib
from resflax.run import workdir as workdir_lib

# What an executor leaves in a run's directory: all that the run printed, and, until it starts
# again, the last error of a run that failed, in one line.
LOG = "log.txt"
ERROR = workdir_lib.ERROR

# The runs of a sweep are compared, so that all must have the same length.
_MAY_DIFFER = config_lib.MAY_DIFFER.keys() - {"train.epochs"}

# How the line begins that says what went wrong: ours, or the end of a traceback. It need not be the
# last one: jax and C++ libraries add theirs.
_ERROR_LINE = re.compile(r"^(error:|[\w.]*(Error|Exception|Interrupt)\b)")


class State(enum.StrEnum):
    """Where a run is."""

    QUEUED = "queued"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    DONE = "done"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True)
class Status:
    """What is known of a run.

    Attributes:
      state: files alone do not tell whether a run is alive: that, an executor knows.
      epoch: that it has come to.
      epochs: that it will have.
      top1: accuracy, from 0 to 1, of the last evaluation; None before the first.
      error: of a run that failed, in one line.
    """

    state: State
    epoch: float = 0.0
    epochs: float = 0.0
    top1: float | None = None
    error: str = ""


def read(run: Run) -> Status:
    """A run's status as its files tell it."""
    other = conflict(run)
    if other:
        return Status(State.FAILED, error=other)
    epochs = float(run.resolve().train.epochs)
    found = result(run.workdir)
    if found is not None:
        return Status(State.DONE, epochs, epochs, found["eval/top1"])
    epoch, top1 = progress(run.workdir)
    error = _read(run.workdir / ERROR).strip()
    if error:
        return Status(State.FAILED, epoch, epochs, top1, error)
    started = os.path.exists(run.workdir / workdir_lib.CONFIG)
    return Status(State.INTERRUPTED if started else State.QUEUED, epoch, epochs, top1)


def result(workdir: pathlib.Path) -> dict[str, float] | None:
    """The numbers of a finished run; None if it is to be started: it has no sound result."""
    try:
        return workdir_lib.read_result(workdir)
    except workdir_lib.WorkdirError:
        return None


def conflict(run: Run) -> str:
    """Why the directory cannot be this run's, or '': it may hold that of another config."""
    if not os.path.exists(run.workdir / workdir_lib.CONFIG):
        return ""
    try:
        found = workdir_lib.read_config(run.workdir)
        changes = config_lib.difference(found, run.resolve(), _MAY_DIFFER)
    except workdir_lib.WorkdirError as error:
        return str(error)
    if not changes:
        return ""
    return f"{run.workdir} holds a run with another config ({'; '.join(changes)})."


def progress(workdir: pathlib.Path) -> tuple[float, float | None]:
    """The epoch that a run has come to, and the accuracy of its last evaluation, if any."""
    try:
        metrics = (workdir / workdir_lib.METRICS).read_bytes()
    except OSError:
        return 0.0, None
    metrics = metrics[: metrics.rfind(b"\n") + 1]  # the last line may be half written
    epoch = _last(metrics, "epoch")
    return epoch or 0.0, _last(metrics, "eval/top1")


def last_error(output: str, code: int) -> str:
    """What made a process fail, in one line.

    Args:
      output: all that it printed.
      code: that it ended with, as subprocess gives it: negative for a signal.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if code < 0:
        return signals.ending(code)
    errors = [line for line in lines if _ERROR_LINE.match(line)]
    return (errors or lines or [signals.ending(code)])[-1].removeprefix("error: ")


def _last(metrics: bytes, name: str) -> float | None:
    """The last value of a metric; the lines before it are many, and are not parsed."""
    at = metrics.rfind(json.dumps(name).encode())
    if at < 0:
        return None
    line = metrics[metrics.rfind(b"\n", 0, at) + 1 : metrics.find(b"\n", at)]
    try:
        return float(json.loads(line)[name])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
