"""A run's directory: whose it is, and its config and data set's description as JSON."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import ml_collections

from resflax import config as config_lib
from resflax.data.sources import Description
from resflax.errors import UserError

CONFIG = "config.json"
DATASET = "dataset.json"
METRICS = "metrics.jsonl"
CURVES = "curves.png"
CHECKPOINTS = "checkpoints"
EVENTS = "tensorboard"
RESULT = "result.json"
BAD_FILES = "bad_files.txt"
ERROR = "error.txt"  # of a launcher: the last line of a run that failed; gone when it starts again


class WorkdirError(UserError):
    """The directory cannot be this run's; the message says why."""


def open_run(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Makes the directory this config's run, new or to be resumed; overwrites nothing.

    Args:
      workdir: absolute.
      config: of the run, resolved.

    Raises:
      WorkdirError: if it is a file, cannot be written, holds another config's run, or files of a
        run without its config.
    """
    if workdir.exists() and not workdir.is_dir():
        raise WorkdirError(f"workdir {workdir} is a file; name a directory, new or of this run.")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(f"workdir {workdir} cannot be made: {error.strerror}.") from None
    if (workdir / CONFIG).exists():
        changes = config_lib.difference(read_config(workdir), config)
        if changes:
            raise WorkdirError(
                f"workdir {workdir} holds a run with another config ({'; '.join(changes)}); "
                "take another --workdir, or the config that it was started with."
            )
        return
    strangers = [n for n in (METRICS, CHECKPOINTS, DATASET) if (workdir / n).exists()]
    if strangers:
        raise WorkdirError(
            f"workdir {workdir} has {', '.join(strangers)} but no {CONFIG}: it is not known whose "
            "run that is; take another --workdir."
        )
    write_atomically(workdir / CONFIG, config_lib.to_json(config))


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all.

    Raises:
      WorkdirError: if the directory cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        raise WorkdirError(f"{path} cannot be written: {error.strerror}.") from None


def write_result(workdir: pathlib.Path, result: dict[str, float]) -> None:
    """Notes what came out: the mark of a finished run."""
    write_atomically(workdir / RESULT, json.dumps(result, indent=2) + "\n")


def write_bad_files(workdir: pathlib.Path, lines: Iterable[str], process: int = 0) -> None:
    """Notes the images that could not be read, beside those that were noted before.

    Args:
      workdir: of the run.
      lines: 'name: reason'; if there are none, nothing is written.
      process: that met them; each but the first has a file of its own, bad_files.N.txt.
    """
    lines = list(lines)
    if not lines:
        return
    path = workdir / (BAD_FILES if process == 0 else f"bad_files.{process}.txt")
    known = path.read_text().splitlines() if path.exists() else []
    write_atomically(path, "\n".join(dict.fromkeys([*known, *lines])) + "\n")


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The run's config.

    Raises:
      WorkdirError: if there is no run, or its config cannot be read.
    """
    try:
        return config_lib.from_json((workdir / CONFIG).read_text())
    except OSError as error:
        raise WorkdirError(f"{workdir} holds no run: {CONFIG}: {error.strerror}.") from None
    except config_lib.ConfigError as error:
        raise WorkdirError(f"{workdir / CONFIG}: {error}") from None


def write_description(workdir: pathlib.Path, description: Description) -> None:
    """Notes what the run's network was made for."""
    text = json.dumps(dataclasses.asdict(description), indent=2) + "\n"
    write_atomically(workdir / DATASET, text)


def read_description(workdir: pathlib.Path) -> Description:
    """The data set of the run.

    Raises:
      WorkdirError: if it cannot be read.
    """
    try:
        text = (workdir / DATASET).read_text()
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()
        }
        description = Description(**fields)
        _require_sound(description)
        return description
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        text = str(error).removesuffix(".")
        raise WorkdirError(f"{workdir / DATASET} cannot be read: {text}.") from None


def _require_sound(description: Description) -> None:
    """Raises WorkdirError for the first field that no data set has."""
    for field, sound, right in (
        ("name", isinstance(description.name, str), "a text"),
        ("image_shape", _are(description.image_shape, int, 1, 2**16, 3), "height, width, channels"),
        ("label_names", _are(description.label_names, str), "texts"),
        ("mean", _are(description.mean, int | float, -1e6, 1e6), "numbers"),
        ("std", _are(description.std, int | float, 1e-12, 1e6), "positive numbers"),
    ):
        if not sound:
            raise WorkdirError(f"{field} {getattr(description, field)!r} must be {right}")
    channels = description.image_shape[-1]
    if not len(description.mean) == len(description.std) == channels:
        raise WorkdirError(f"mean and std must be of {channels} channels")


def _are(values: Any, kind: Any, low: float = 0, high: float = 0, count: int = 0) -> bool:
    """Whether values are a tuple of a kind, of numbers between limits, and perhaps so many."""
    return (
        isinstance(values, tuple)
        and len(values) > 0
        and count in (0, len(values))
        and all(isinstance(v, kind) and (isinstance(v, str) or low <= v <= high) for v in values)
    )
