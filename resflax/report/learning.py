"""Learning curves of configurations side by side, with bands over seeds."""

import collections
import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resflax import figures
from resflax.report import axes as axes_lib
from resflax.report.runs import Record
from resflax.report.study import Axis, Group, Study

# Panels of one figure, 4 to a row: no more fit on a page.
_MOST_PANELS = 24

# Of a line, about so many: colours alone do not tell lines apart for everybody.
_MARKERS = 6

_ACCURACY = "eval/top1"


def draw(study: Study, axis: Axis | None) -> Iterator[Figure]:
    """Figures of the accuracy over epochs: a line for each value of an axis, its mean over seeds.

    A panel has the configurations that differ in this axis alone. Bands are one standard deviation
    to either side. Only finished runs count; of a configuration without any, those are drawn that
    there are, dashed.

    Args:
      study: of the runs.
      axis: None if nothing varies.

    Yields:
      Figures of up to 24 panels; none if no run has been evaluated.
    """
    others = [other for other in study.axes if other is not axis]
    panels: dict[tuple[Any, ...], list[Group]] = collections.defaultdict(list)
    for group in study.groups:
        if any(_evaluations(run) for run in group.runs):
            panels[tuple(other.value(group) for other in others)].append(group)
    titles = {key: ", ".join(map(axes_lib.setting, others, key)) for key in panels}
    for start in range(0, len(panels), _MOST_PANELS):
        keys = itertools.islice(panels, start, start + _MOST_PANELS)
        yield _figure({titles[key]: panels[key] for key in keys}, axis)


def _figure(panels: dict[str, list[Group]], axis: Axis | None) -> Figure:
    columns = _columns(len(panels))
    rows = -(-len(panels) // columns)
    width = figures.PAGE if columns > 2 else figures.COLUMN
    height = 2.3 if columns == 1 else 1.6
    figure = Figure(figsize=(width, 0.2 + height * rows), layout="constrained")
    places = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for place in places.flat[len(panels) :]:
        place.set_axis_off()
    for number, (title, groups) in enumerate(panels.items()):
        place = places.flat[number]
        _panel(place, groups, axis)
        characters = int(19 * width / columns)
        place.set_title(
            textwrap.fill(title, characters), fontsize=figures.FONT - 1, color=figures.INK
        )
        # The panel below may be one that is left empty.
        is_lowest = number + columns >= len(panels)
        place.tick_params(labelbottom=is_lowest)
        place.set_xlabel("epoch" if is_lowest else "")
        place.set_ylabel("" if number % columns else "top-1 accuracy (%)")
    if axis is not None:
        axes_lib.legend(figure, axis, "-")
    return figure


def _columns(panels: int) -> int:
    """How many panels stand side by side, so that the last row is as full as can be."""
    if panels <= 4:
        return (1, 2, 3, 2)[panels - 1]
    return min(4, 3, key=lambda columns: -panels % columns)


def _panel(panel: Axes, groups: Sequence[Group], axis: Axis | None) -> None:
    figures.style(panel)
    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panel.yaxis.set_major_locator(MaxNLocator(5))
    for group in groups:
        look: dict[str, Any] = {"color": figures.COLOURS[0], "marker": "o"}
        if axis is not None:
            look = axes_lib.looks(axis)[axis.values.index(axis.value(group))]
        epochs, means, stds = _curve(group.finished or group.runs)
        panel.plot(
            epochs,
            means,
            **look,
            linestyle="-" if group.finished else "--",
            linewidth=1.1,
            markersize=3,
            markevery=max(1, len(epochs) // _MARKERS),
            markeredgecolor="white",
            markeredgewidth=0.3,
        )
        low, high = means - stds, means + stds
        panel.fill_between(epochs, low, high, color=look["color"], alpha=0.2, linewidth=0)


def _evaluations(run: Record) -> list[tuple[float, float]]:
    """Epochs, and the accuracy after them in per cent."""
    return [
        (line["epoch"], 100 * line[_ACCURACY])
        for line in run.metrics
        if math.isfinite(line.get(_ACCURACY, math.nan))
    ]


def _curve(runs: Sequence[Record]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs, mean and standard deviation (0 of one run) of the accuracy, all [n]."""
    by_epoch: dict[float, list[float]] = collections.defaultdict(list)
    for run in runs:
        for epoch, accuracy in _evaluations(run):
            by_epoch[epoch].append(accuracy)
    epochs = sorted(by_epoch)
    means = [np.mean(by_epoch[epoch]) for epoch in epochs]
    stds = [
        np.std(by_epoch[epoch], ddof=1) if len(by_epoch[epoch]) > 1 else 0.0 for epoch in epochs
    ]
    return np.array(epochs), np.array(means), np.array(stds)
