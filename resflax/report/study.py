"""Runs compared: which fields of their configs vary, and what came out for each configuration."""

import collections
import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Self

from resflax import config as config_lib
from resflax.errors import UserError
from resflax.models import Count
from resflax.parts import NONE, Parts
from resflax.report import runs as runs_lib
from resflax.report.runs import Outcome, Record

_SEED = "seed"

# What studies of residual networks vary comes first, in this order; the rest by its name.
_FIRST = ("name", "depth", "cardinality", "base_width", "se_reduction", "shortcut")


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A number over the seeds of a configuration.

    Attributes:
      mean: of the runs.
      std: their standard deviation, with n - 1 in the denominator; None: of one run there is none.
      n: runs.
    """

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Self | None:
        """That of some values; None if there are none."""
        values = list(values)
        if not values:
            return None
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, len(values))


@dataclasses.dataclass(frozen=True)
class Group:
    """The runs of one configuration, which differ in the seed alone.

    Attributes:
      settings: the fields that vary in the study, with their values here.
      runs: one for each seed.
      size: of the network for one image; None: not known.
    """

    settings: dict[str, Any]
    runs: Sequence[Record]
    size: Count | None

    @functools.cached_property
    def finished(self) -> list[Record]:
        """The runs that statistics are of."""
        return [run for run in self.runs if run.state is Outcome.FINISHED]

    @property
    def final_error(self) -> Statistic | None:
        """Top-1 error after the last step, per cent."""
        return self._error("eval/top1")

    @property
    def best_error(self) -> Statistic | None:
        """Top-1 error at each run's best evaluation, per cent."""
        return self._error("best/top1")

    @property
    def test_error(self) -> Statistic | None:
        """Top-1 error of the test images after the last step, of runs that validated on others."""
        return self._error("test/top1")

    @property
    def best_test_error(self) -> Statistic | None:
        """Likewise, at each run's best evaluation."""
        return self._error("best/test_top1")

    def _error(self, name: str) -> Statistic | None:
        """100 - 100 x a share, of the runs that have it, per cent."""
        shares = (run.result[name] for run in self.finished if name in run.result)
        return Statistic.of(100 - 100 * share for share in shares)

    @property
    def accuracy(self) -> Statistic | None:
        """Top-1 accuracy after the last step, per cent."""
        return Statistic.of(100 * run.result["eval/top1"] for run in self.finished)

    @property
    def seconds(self) -> Statistic | None:
        """Of a whole run."""
        return Statistic.of(run.seconds for run in self.finished)


@dataclasses.dataclass(frozen=True)
class Axis:
    """Something that varies: a field, or fields whose values determine each other.

    Attributes:
      fields: their dotted names.
      labels: the same, as short as is clear.
      values: of the fields, in order.
    """

    fields: tuple[str, ...]
    labels: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]

    def value(self, group: Group) -> tuple[Any, ...]:
        """That of a group."""
        return tuple(group.settings[field] for field in self.fields)

    @property
    def ordered(self) -> bool:
        """Whether the values are numbers."""
        return all(type(value[0]) in (int, float) for value in self.values)


@dataclasses.dataclass(frozen=True)
class Study:
    """Runs, by configuration.

    Attributes:
      runs: all that were found.
      axes: what varies between their configs, except the seed.
      groups: in the order of their settings.
      common: the fields that do not vary, with their values.
      labels: names of all fields, as short as is clear.
      notes: paths of runs, and what is to be said of each.
    """

    runs: Sequence[Record]
    axes: Sequence[Axis]
    groups: Sequence[Group]
    common: dict[str, Any]
    labels: dict[str, str]
    notes: Sequence[tuple[pathlib.Path, str]]

    @property
    def fields(self) -> list[str]:
        """What varies, field by field."""
        return [field for field in self.labels if any(field in a.fields for a in self.axes)]


def compare(runs: Sequence[Record], parts: Parts = NONE) -> Study:
    """Groups runs by the fields that vary between their configs, the seed apart.

    Runs without a config are in no group. Of those with the same config and seed only one is, a
    finished one if there is one: a repetition is no further sample.

    Args:
      runs: that were found.
      parts: of the user's own, of the runs that have some.
    """
    notes = {run.path: [_remark(run)] for run in runs}
    configs = {run.path: config_lib.flatten(run.config) for run in runs if run.config is not None}
    # An argument of the network that a run does not set is None there.
    fields = dict.fromkeys(field for config in configs.values() for field in config)
    configs = {path: {f: config.get(f) for f in fields} for path, config in configs.items()}
    first = _in_order(next(iter(configs.values()), {}))
    varying = [
        field
        for field in first
        if field != _SEED and len({config[field] for config in configs.values()}) > 1
    ]
    members: dict[tuple[Any, ...], dict[int, Record]] = {}
    for run in sorted(runs, key=lambda run: run.state is not Outcome.FINISHED):
        if run.config is not None:
            settings = tuple(configs[run.path][field] for field in varying)
            same = members.setdefault(settings, {}).setdefault(run.config.seed, run)
            if same is not run:
                notes[run.path].append(f"not counted: same config and seed as {same.path}.")
    sizes = _Sizes(parts)
    groups = []
    for settings in sorted(members, key=lambda values: [order(value) for value in values]):
        seeds = [run for _, run in sorted(members[settings].items())]
        size, problem = sizes.of(seeds)
        notes[seeds[0].path].append(problem)
        groups.append(Group(dict(zip(varying, settings, strict=True)), seeds, size))
    labels = _labels(first)
    said = ((path, " ".join(filter(None, texts))) for path, texts in notes.items())
    return Study(
        runs=runs,
        axes=_axes(groups, varying, labels),
        groups=groups,
        common={field: value for field, value in first.items() if field not in varying},
        labels=labels,
        notes=[(path, text) for path, text in said if text],
    )


def order(value: Any) -> tuple[int, Any]:
    """A key that sorts the values of a field, which may be of several types or None."""
    if value is None:
        return 0, 0
    if isinstance(value, bool | int | float):
        return 1, value
    return 2, str(value)


def show(value: Any) -> str:
    """The value of a field, for people; None is the network's own default."""
    return "default" if value is None else str(value)


def _remark(run: Record) -> str:
    return run.note if run.state is Outcome.FINISHED else f"{run.state.value}: {run.note}"


def _in_order(fields: Mapping[str, Any]) -> dict[str, Any]:
    first = [f"model.{name}" for name in _FIRST]
    names = sorted(fields, key=lambda n: (first.index(n) if n in first else len(first), n))
    return {name: fields[name] for name in names}


def _labels(fields: Iterable[str]) -> dict[str, str]:
    """The last part of each name, or all of it where several fields end so."""
    fields = list(fields)
    ends = collections.Counter(field.rpartition(".")[2] for field in fields)
    return {field: end if ends[end := field.rpartition(".")[2]] == 1 else field for field in fields}


def _axes(groups: Sequence[Group], varying: Sequence[str], labels: Mapping[str, str]) -> list[Axis]:
    """The fields, those in one whose values divide the groups in the same way."""
    together: dict[tuple[int, ...], list[str]] = {}
    for field in varying:
        column = [group.settings[field] for group in groups]
        together.setdefault(tuple(map(column.index, column)), []).append(field)
    axes = []
    for fields in together.values():
        values = {tuple(group.settings[field] for field in fields) for group in groups}
        ordered = sorted(values, key=lambda value: [order(part) for part in value])
        short = tuple(labels[field] for field in fields)
        axes.append(Axis(tuple(fields), short, tuple(ordered)))
    return axes


class _Sizes:
    """Counts networks, each only once: most sweeps have many runs of few networks."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._known: dict[Hashable, tuple[Count | None, str]] = {}

    def of(self, seeds: Sequence[Record]) -> tuple[Count | None, str]:
        """The size of the network of a configuration, or why it is not known."""
        run = next((run for run in seeds if run.description is not None), None)
        if run is None or run.config is None or run.description is None:
            return None, ""  # said of each run
        network = config_lib.flatten(run.config.model)
        image = run.description.image_shape
        key: tuple[Hashable, ...] = *network.items(), run.description.num_classes, image
        try:
            key = *key, runs_lib.has_own_model(run)
            if key not in self._known:
                self._known[key] = runs_lib.size(run, self._parts), ""
        except UserError as error:
            self._known[key] = None, str(error)
        return self._known[key]
