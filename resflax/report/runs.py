"""Finds the runs under directories, and reads of each what its files tell, whole or damaged."""

import dataclasses
import enum
import functools
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections

from resflax import config as config_lib
from resflax.data.sources import Description
from resflax.errors import UserError
from resflax.models import Count, count
from resflax.run import curves
from resflax.run import workdir as workdir_lib

# A directory with one of these is a run, or what is left of one.
_MARKS = {workdir_lib.CONFIG, workdir_lib.METRICS, workdir_lib.ERROR}

# Of a result, those that are shares of the evaluated images, and of the test images where a run
# was evaluated on others.
_SHARES = ("eval/top1", "best/top1")
_TEST_SHARES = ("test/top1", "best/test_top1")


class State(enum.Enum):
    """How far a run came."""

    FINISHED = "finished"
    UNFINISHED = "running or interrupted"  # the files of both look the same
    FAILED = "failed"
    DAMAGED = "damaged"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, as its directory shows it.

    Attributes:
      path: of the directory, as it was found.
      state: how far it came.
      note: what is to be said of it; "": nothing.
      config: None if there is none that can be read.
      description: of its data set; None likewise.
      metrics: see resflax.run.curves.read_metrics; () if it cannot be read.
      result: of a finished run, see resflax.train; else empty.
      seconds: that it took, with its earlier starts.
    """

    path: pathlib.Path
    state: State
    note: str = ""
    config: ml_collections.ConfigDict | None = None
    description: Description | None = None
    metrics: curves.Metrics = ()
    result: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


def find(directories: Sequence[pathlib.Path]) -> list[Run]:
    """The runs in directories and in what is under them, each once, in the order of their paths.

    Raises:
      UserError: if one of the directories is none, or there is no run in it.
    """
    seen: set[str] = set()
    found: list[pathlib.Path] = []
    for directory in directories:
        if not os.path.isdir(directory):
            raise UserError(f"{directory} is not a directory; name one that holds runs.")
        here = list(_walk(directory))
        if not here:
            raise UserError(
                f"{directory} holds no run: neither it nor a directory under it has a "
                f"{workdir_lib.CONFIG}."
            )
        for path in here:
            if (real := os.path.realpath(path)) not in seen:
                seen.add(real)
                found.append(path)
    return [read(path) for path in found]


def read(path: pathlib.Path) -> Run:
    """What a run's directory tells; nothing in it raises an error."""
    problems: list[str] = []

    def attempt(reader: Callable[[pathlib.Path], Any], name: str) -> Any:
        try:
            return reader(path) if (path / name).exists() else None
        except (OSError, ValueError, RecursionError) as error:
            text = _one_line(str(error).replace(f"{path}{os.sep}", ""))
            problems.append(text if name in text else f"{name}: {text}")
            return None

    config = attempt(_config, workdir_lib.CONFIG)
    left_out: list[str] = []
    metrics = attempt(functools.partial(_metrics, left_out), workdir_lib.METRICS) or ()
    result = attempt(_result, workdir_lib.RESULT)
    error = attempt(_error, workdir_lib.ERROR)
    damaged = bool(problems)
    problems += left_out[:1]
    description = attempt(workdir_lib.read_description, workdir_lib.DATASET)
    run = Run(path, State.FINISHED, "", config, description, metrics)
    if config is None and not problems and not error:
        problems.append(f"{workdir_lib.CONFIG} is missing.")
    if config is not None and result is not None:
        infinite = [name for name, value in result.items() if not math.isfinite(value)]
        if infinite:
            return _with(run, State.FAILED, f"{infinite[0]} is {result[infinite[0]]}.", *problems)
        if description is None and not problems:
            problems.append(f"{workdir_lib.DATASET} is missing.")
        problems.append(_disagreement(result, metrics))
        seconds = _earlier_seconds(metrics, result["seconds"])
        run = dataclasses.replace(run, result=result, seconds=seconds)
        return _with(run, State.FINISHED, *problems)
    if error:
        return _with(run, State.FAILED, error, *problems)
    if config is None or damaged:
        return _with(run, State.DAMAGED, *problems)
    if failure := _failure(path, metrics):
        return _with(run, State.FAILED, failure, *problems)
    return _with(run, *_progress(config, metrics), *problems)


def size(run: Run) -> Count:
    """Parameters and multiply-adds of a run's network for an image of its data set.

    Raises:
      UserError: if its config and data set cannot be those of a network.
    """
    if run.config is None or run.description is None:
        raise UserError(f"{workdir_lib.CONFIG} and {workdir_lib.DATASET} cannot be read.")
    try:
        model = config_lib.build_model(run.config, run.description.num_classes)
        return count(model, run.description.image_shape)
    except (ValueError, TypeError) as error:  # of the shapes in a damaged file, jax raises either
        raise UserError(f"the network cannot be counted: {_one_line(str(error))}") from None


def _walk(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """The runs of a directory; what is under a run belongs to it."""
    visited: set[str] = set()
    for root, folders, files in os.walk(directory, followlinks=True):
        # A link to a directory above leads here again.
        real = os.path.realpath(root)
        if real in visited or _MARKS & set(files):
            folders.clear()
        folders.sort()
        if real not in visited and _MARKS & set(files):
            yield pathlib.Path(root)
        visited.add(real)


def _with(run: Run, state: State, *notes: str) -> Run:
    return dataclasses.replace(run, state=state, note=" ".join(filter(None, notes)))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _config(path: pathlib.Path) -> ml_collections.ConfigDict:
    config = workdir_lib.read_config(path)
    for field, value in config_lib.flatten(config).items():
        try:
            hash(value)  # as comparing runs does
        except TypeError:
            raise UserError(f"{workdir_lib.CONFIG}: {field} cannot be {value!r}.") from None
    return config


def _metrics(left_out: list[str], path: pathlib.Path) -> list[dict[str, float]]:
    def report(text: str) -> None:
        left_out.append(text.replace(f"{path}{os.sep}", ""))

    return curves.read_metrics(path / workdir_lib.METRICS, report)


def _failure(path: pathlib.Path, metrics: curves.Metrics) -> str:
    """The step whose numbers were not finite, where the run came no further; else ''."""
    try:
        failure = json.loads((path / workdir_lib.FAILURE).read_text(encoding="utf-8"))
        step, loss, norm = (failure[name] for name in ("step", "loss", "grad_norm"))
        if metrics and metrics[-1]["step"] >= step:
            return ""
        return f"step {step:d} has loss {loss:g} and a gradient of norm {norm:g}."
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _error(path: pathlib.Path) -> str:
    text = (path / workdir_lib.ERROR).read_text(encoding="utf-8", errors="replace")
    lines = text.strip().splitlines()
    return _one_line(lines[-1]) if lines else "nobody noted why."


def _result(path: pathlib.Path) -> dict[str, float]:
    """The numbers of result.json, which may be infinite.

    Raises:
      UserError: if it is not the result of a run.
    """
    try:
        result = json.loads((path / workdir_lib.RESULT).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{workdir_lib.RESULT} cannot be read: {error}.") from None
    if not isinstance(result, dict):
        raise UserError(f"{workdir_lib.RESULT} is not the result of a run.")
    numbers = {
        name: value
        for name, value in result.items()
        if type(value) is float or (type(value) is int and abs(value) < 2**63)
    }
    for name in (*_SHARES, "seconds"):
        if name not in numbers:
            raise UserError(f"{workdir_lib.RESULT} has no number {name}.")
    for name in filter(numbers.__contains__, (*_SHARES, *_TEST_SHARES)):
        if result[name] < 0 or result[name] > 1:
            raise UserError(f"{workdir_lib.RESULT}: {name} {result[name]} is not from 0 to 1.")
    if numbers["seconds"] < 0:
        raise UserError(f"{workdir_lib.RESULT}: seconds {numbers['seconds']} is negative.")
    return numbers


def _disagreement(result: dict[str, float], metrics: curves.Metrics) -> str:
    """What the result says otherwise than the metrics; '': nothing."""
    evaluations = [line["eval/top1"] for line in metrics if "eval/top1" in line]
    if not evaluations:
        return ""
    for name, value in zip(_SHARES, (evaluations[-1], max(evaluations)), strict=True):
        if not math.isclose(result[name], value, abs_tol=1e-6):
            return (
                f"{name} is {result[name]} in {workdir_lib.RESULT}, and {value} by "
                f"{workdir_lib.METRICS}."
            )
    return ""


def _earlier_seconds(metrics: curves.Metrics, seconds: float) -> float:
    """Seconds of all starts of a run whose last one took `seconds`.

    The metrics have the time since a start; where it runs back, there was another one.
    """
    times = [line.get("time", 0.0) for line in metrics]
    ends = [before for before, after in itertools.pairwise(times) if after < before]
    # A start that found the run complete notes the seconds of that.
    return sum(ends) + max(seconds, times[-1] if times else 0.0)


def _progress(config: ml_collections.ConfigDict, metrics: curves.Metrics) -> tuple[State, str]:
    """How far a run without a result came."""
    if not metrics:
        return State.UNFINISHED, "no metrics yet."
    last = metrics[-1]
    where = f"step {last['step']}, epoch {last['epoch']:g} of {config.train.epochs:g}."
    for name, value in last.items():
        if not math.isfinite(value):
            return State.FAILED, f"{name} is {value} at {where}"
    return State.UNFINISHED, where
