"""What a run of a sweep is, and which runs a command line asks for."""

import ast
import collections
import dataclasses
import hashlib
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from resflax.errors import UserError
from resflax.process import command, program

SEED = "seed"

_LONGEST = 255  # bytes, of a name in the file systems of Linux and macOS


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of a sweep.

    Attributes:
      name: tells it from the others of its sweep, such as 'depth=20,shortcut=A'.
      config: FILE.py or FILE.py:DATASET.
      overrides: of the config, by dotted fields.
      workdir: its own, absolute.
    """

    name: str
    config: str
    overrides: Mapping[str, Any]
    workdir: pathlib.Path

    @property
    def command(self) -> list[str]:
        """What starts it, or goes on with it, in the directory that the config's path is from."""
        command = [sys.executable, "-m", "resflax.main", "--config", self.config]
        return [*command, *self._flags, "--workdir", str(self.workdir)]

    def resolve(self) -> ml_collections.ConfigDict:
        """The config that it trains by.

        Raises:
          UserError: if the config has no such fields.
        """
        return command.load(self.config, self._flags)

    @property
    def _flags(self) -> list[str]:
        return [f"--config.{field}={value}" for field, value in self.overrides.items()]


def expand(
    config: str,
    workdir: pathlib.Path,
    *,
    filters: Sequence[tuple[str, str]] = (),
    seeds: Sequence[int] = (),
    overrides: Mapping[str, str] | None = None,
) -> list[Run]:
    """The runs of a config's `sweep()`, in its order.

    Args:
      config: FILE.py or FILE.py:DATASET.
      workdir: of the sweep; each run has a directory in it, by its name.
      filters: fields and values: a run is kept if it has one of each field's values.
      seeds: each run is repeated with each; without, the config's own is used.
      overrides: of all runs, beside what varies; not in their names.

    Raises:
      UserError: if the file has no sweep, there is nothing to run, or a field cannot be set.
    """
    overrides = dict(overrides or {})
    runs = []
    for varied in _repeat(_sweep(config.partition(":")[0]), seeds):
        twice = sorted(overrides.keys() & varied.keys())
        if twice:
            raise UserError(f"--override {twice[0]}: the sweep sets it; --filter chooses runs.")
        name = name_of(varied)
        runs.append(Run(name, config, varied | overrides, workdir.resolve() / name))
    runs = _filter(runs, filters)
    for name, count in collections.Counter(run.name for run in runs).items():
        if count > 1:
            raise UserError(f"the sweep of {config} has {count} runs named {name}.")
    for run in runs:
        run.resolve()  # a field that is not there is told before anything runs
    return runs


def name_of(overrides: Mapping[str, Any]) -> str:
    """A directory's name: the last part of each field, and its value.

    A name longer than a file system takes ends in its digest.
    """
    parts = (f"{field.split('.')[-1]}={value}" for field, value in overrides.items())
    name = ",".join(parts).replace("/", "_")
    encoded = os.fsencode(name)
    if len(encoded) <= _LONGEST:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    return f"{encoded[: _LONGEST - 17].decode(errors='ignore')}~{digest}"


def _sweep(config_file: str) -> Iterator[dict[str, Any]]:
    names = program.run(config_file)
    if "sweep" not in names:
        raise UserError(f"{config_file} has no sweep().")
    for varied in program.call(config_file, lambda: list(names["sweep"]())):
        if not isinstance(varied, Mapping) or not all(isinstance(key, str) for key in varied):
            raise UserError(
                f"{config_file}: sweep() yields {varied!r}; it must yield dicts from dotted fields "
                "to values."
            )
        yield dict(varied)


def _repeat(runs: Iterator[dict[str, Any]], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    for varied in runs:
        if seeds and SEED in varied:
            raise UserError("--seeds: the sweep sets the seed itself.")
        yield from ({**varied, SEED: seed} for seed in seeds) if seeds else [varied]


def _filter(runs: Sequence[Run], filters: Sequence[tuple[str, str]]) -> list[Run]:
    wanted = collections.defaultdict(list)
    for field, text in filters:
        values = {str(run.overrides[field]): None for run in runs if field in run.overrides}
        if not values:
            fields = dict.fromkeys(field for run in runs for field in run.overrides)
            raise UserError(f"--filter {field}: the sweep varies {', '.join(fields)}.")
        if not any(_same(value, text) for value in values):
            raise UserError(f"--filter {field}={text}: the sweep has {', '.join(values)}.")
        wanted[field].append(text)
    kept = [
        run
        for run in runs
        if all(
            field in run.overrides and any(_same(str(run.overrides[field]), text) for text in texts)
            for field, texts in wanted.items()
        )
    ]
    if not kept:
        raise UserError("no run has all that --filter asks for." if runs else "the sweep is empty.")
    return kept


def _same(value: str, text: str) -> bool:
    """Whether two texts are the same value, as 0.1 and 1e-1 are."""
    if value == text:
        return True
    try:
        return bool(ast.literal_eval(value) == ast.literal_eval(text))
    except (SyntaxError, ValueError):
        return False
