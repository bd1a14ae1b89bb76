"""A run's directory: whose it is, and its config and data set's description as JSON."""

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import ml_collections

from resflax import config as config_lib
from resflax import disk
from resflax.data.sources import Description
from resflax.errors import UserError

CONFIG = "config.json"
DATASET = "dataset.json"
METRICS = "metrics.jsonl"
CURVES = "curves.png"
CHECKPOINTS = "checkpoints"
FAILURE = "failure.json"
EVENTS = "tensorboard"
RESULT = "result.json"
BAD_FILES = "bad_files.txt"
PARTS = "parts.json"  # of a run with parts of the user's own
ERROR = "error.txt"  # of a launcher: the last line of a run that failed; gone when it starts again

# Of a result: the accuracies after the last step and of the best, from 0 to 1; and those of the
# test images, where others were evaluated meanwhile.
SHARES = ("eval/top1", "best/top1")
TEST_SHARES = ("test/top1", "best/test_top1")

# Of equal images, mean and deviation differ by less where another library decodes them.
_TOLERANCE = 1e-3


class WorkdirError(UserError):
    """The directory cannot be this run's; the message says why."""


def make(workdir: pathlib.Path) -> None:
    """Makes the directory, unless it is there.

    Raises:
      WorkdirError: if it is a file, or cannot be made.
    """
    if workdir.exists() and not workdir.is_dir():
        raise WorkdirError(f"workdir {workdir} is a file; name a directory, new or of this run.")
    try:
        disk.make_directory(workdir)
    except OSError as error:
        raise WorkdirError(f"workdir {workdir} cannot be made: {error.strerror}.") from None


def open_run(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, saved_by: Collection[str] = ()
) -> None:
    """Makes the directory this config's run, new or to be resumed; overwrites nothing.

    A config.json that is lost or cannot be read is written anew where nothing else of a run is
    there, or where the checkpoints are of this config.

    Args:
      workdir: absolute.
      config: of the run, resolved.
      saved_by: SHA-256 of the configs that the checkpoints there were saved with.

    Raises:
      WorkdirError: if it is a file, cannot be written, holds another config's run, or files of a
        run without its config.
    """
    make(workdir)
    path, text = workdir / CONFIG, config_lib.to_json(config)
    left = [n for n in (METRICS, CHECKPOINTS, DATASET) if (workdir / n).exists()]
    # A power cut can take its bytes or its name, of a file that was not brought to the disk.
    is_known = hashlib.sha256(text.encode()).hexdigest() in saved_by
    if path.exists():
        try:
            changes = config_lib.difference(read_config(workdir), config, config_lib.MAY_DIFFER)
        except WorkdirError:
            if not is_known and (left or not _is_blank(path)):
                raise
        else:
            if changes:
                raise WorkdirError(
                    f"workdir {workdir} holds a run with another config ({'; '.join(changes)}); "
                    "take another --workdir, or the config that it was started with."
                )
            return
    elif left and not is_known:
        raise WorkdirError(
            f"workdir {workdir} has {', '.join(left)} but no {CONFIG}: it is not known whose "
            "run that is; take another --workdir."
        )
    write_atomically(path, text)


def renew_config(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Notes what differs from the run's last start (see config.MAY_DIFFER).

    A result for another number of epochs is that of this run no more, and goes.
    """
    before = read_config(workdir)
    if before.train.epochs != config.train.epochs:
        (workdir / RESULT).unlink(missing_ok=True)
    if config_lib.difference(before, config):
        write_atomically(workdir / CONFIG, config_lib.to_json(config))


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all, also after a power cut.

    Raises:
      WorkdirError: if the directory cannot be written.
    """
    try:
        disk.write(path, text.encode())
    except OSError as error:
        raise WorkdirError(f"{path} cannot be written: {error.strerror}.") from None


def open_parts(workdir: pathlib.Path, parts: Mapping[str, str]) -> None:
    """Notes which parts of a new run are the user's own; of an old one, they must be the same.

    Args:
      workdir: of the run.
      parts: what they are, for a person, by their names: see resflax.parts.

    Raises:
      WorkdirError: if the run was begun with others.
    """
    if (workdir / CHECKPOINTS).exists():
        noted = read_parts(workdir)
        for name in sorted(noted.keys() ^ parts.keys()):
            begun, on = ("without", "with") if name in parts else ("with", "without")
            raise WorkdirError(
                f"workdir {workdir} holds a run that was begun {begun} get_{name} in its config "
                f"file (or {name}=), and cannot go on {on} it; take another --workdir, or what it "
                "was started with."
            )
    if parts:
        write_atomically(workdir / PARTS, json.dumps(dict(parts), indent=2) + "\n")
    else:
        (workdir / PARTS).unlink(missing_ok=True)


def read_parts(workdir: pathlib.Path) -> dict[str, str]:
    """The parts of a run that are the user's own, by their names; nothing of them is here.

    Raises:
      WorkdirError: if what was noted cannot be read.
    """
    path = workdir / PARTS
    try:
        return {name: str(text) for name, text in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise WorkdirError(
            f"{path} cannot be read: {str(error).removesuffix('.')}. The run's command writes it "
            "anew once it is deleted."
        ) from None


def require_part(workdir: pathlib.Path, name: str, what: str) -> None:
    """Raises WorkdirError if a part that is needed is the user's own.

    Args:
      workdir: of the run.
      name: of the part.
      what: it is, for a person.
    """
    noted = read_parts(workdir)
    if name in noted:
        raise WorkdirError(
            f"the {what} of {workdir} is of the run's own config file (get_{name}: "
            f"{noted[name]}): give config_file= (or {name}=), or --config_file FILE.py on a "
            "command line."
        )


def write_result(workdir: pathlib.Path, result: dict[str, float]) -> None:
    """Notes what came out: the mark of a finished run."""
    write_atomically(workdir / RESULT, json.dumps(result, indent=2) + "\n")


def read_result(workdir: pathlib.Path) -> dict[str, float] | None:
    """The numbers of a finished run's result.json, which may be infinite; None if there is none.

    Raises:
      WorkdirError: if the file is not the result of a run.
    """
    try:
        result = json.loads((workdir / RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise WorkdirError(f"{RESULT} cannot be read: {error}.") from None
    if not isinstance(result, dict):
        raise WorkdirError(f"{RESULT} is not the result of a run.")
    numbers = {
        name: value
        for name, value in result.items()
        if type(value) is float or (type(value) is int and abs(value) < 2**63)
    }
    for name in (*SHARES, "seconds"):
        if name not in numbers:
            raise WorkdirError(f"{RESULT} has no number {name}.")
    for name in filter(numbers.__contains__, (*SHARES, *TEST_SHARES)):
        if numbers[name] < 0 or numbers[name] > 1:
            raise WorkdirError(f"{RESULT}: {name} {numbers[name]} is not from 0 to 1.")
    if numbers["seconds"] < 0:
        raise WorkdirError(f"{RESULT}: seconds {numbers['seconds']} is negative.")
    return numbers


def write_bad_files(workdir: pathlib.Path, lines: Iterable[str], process: int = 0) -> None:
    """Notes the images that could not be read, beside those that were noted before.

    Args:
      workdir: of the run.
      lines: 'name: reason'; if there are none, nothing is written.
      process: that met them; each but the first has a file of its own, bad_files.N.txt.

    Raises:
      OSError: if they cannot be written.
    """
    lines = list(lines)
    if not lines:
        return
    path = workdir / (BAD_FILES if process == 0 else f"bad_files.{process}.txt")
    known = path.read_text(errors="replace").splitlines() if path.exists() else []
    text = "\n".join(dict.fromkeys([*known, *lines])) + "\n"
    disk.write(path, text.encode(errors="replace"), durable=False)


def _is_blank(path: pathlib.Path) -> bool:
    return not path.read_bytes().strip(b"\0 \n")


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The run's config.

    Raises:
      WorkdirError: if there is no run, or its config cannot be read.
    """
    path = workdir / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip("\0 \n"):
            raise WorkdirError(
                f"{path} is empty. The command that started the run writes it anew where it has "
                "checkpoints; else put back a copy, or take another --workdir."
            )
        return config_lib.from_json(text)
    except OSError as error:
        raise WorkdirError(f"{workdir} holds no run: {CONFIG}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise WorkdirError(f"{path}: not a config of resflax: {error}") from None
    except config_lib.ConfigError as error:
        raise WorkdirError(f"{path}: {error}") from None


def data_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two data sets, as lines 'data NAME: old -> new'; of lists, the first.

    Args:
      old: fields of a Description, and other numbers; what only one of the two has does not count.
      new: likewise.
    """
    changes = []
    for name in old.keys() & new.keys():
        a, b = (list(v) if isinstance(v, list | tuple) else [v] for v in (old[name], new[name]))
        pairs = itertools.zip_longest(a, b)
        different = [(i, x, y) for i, (x, y) in enumerate(pairs) if not _same(name, x, y)]
        if different:
            i, x, y = different[0]
            place = f"[{i}]" if len(a) > 1 or len(b) > 1 else ""
            changes.append(f"data {name}{place}: {x!r} -> {y!r}")
    return sorted(changes)


def _same(name: str, a: Any, b: Any) -> bool:
    if name in ("mean", "std") and isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, abs_tol=_TOLERANCE)
    return bool(a == b)


def require_same_data(workdir: pathlib.Path, description: Description) -> None:
    """Raises WorkdirError if the run was made for other data than it is to go on with."""
    try:
        old = dataclasses.asdict(read_description(workdir))
    except WorkdirError:
        return
    if changes := data_difference(old, dataclasses.asdict(description)):
        raise WorkdirError(
            f"workdir {workdir} holds a run with other data ({'; '.join(changes)}); put back its "
            "data, or take another --workdir."
        )


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
        raise WorkdirError(
            f"{workdir / DATASET} cannot be read: {text}. The run's command writes it anew."
        ) from None


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
