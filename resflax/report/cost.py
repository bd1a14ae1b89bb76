"""Accuracy against what a network costs: parameters and multiply-adds."""

import math
from collections.abc import Callable, Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from resflax import figures
from resflax.models import Count
from resflax.report import axes as axes_lib
from resflax.report.study import Axis, Group, Study

_COSTS: dict[str, Callable[[Count], int]] = {
    "parameters": lambda size: size.params,
    "multiply-adds per image": lambda size: size.macs,
}

_UNITS = {1: "", 10**3: " (thousands)", 10**6: " (millions)", 10**9: " (billions)"}

# A wider range of costs, the greatest over the least, gets a logarithmic axis.
_LOG_RANGE = 4.0

# The ticks of a decade of a logarithmic axis, for ranges up to so much.
_TICKS = ((12, (1, 1.5, 2, 3, 5, 7)), (60, (1, 2, 5)), (1000, (1, 3)), (math.inf, (1,)))


def draw(study: Study, axis: Axis) -> Figure | None:
    """A figure with the configurations by cost, told apart by their value on one axis.

    Error bars are the standard deviation over seeds. Where one other thing varies, and that by
    numbers, lines join what differs in it alone; where more does, lines lead through the
    configurations than which nothing cheaper is better.

    Returns:
      The figure; None if no cost differs between finished runs.
    """
    groups = [group for group in study.groups if group.size is not None and group.finished]
    panels = {
        name: cost
        for name, cost in _COSTS.items()
        if len({cost(group.size) for group in groups if group.size is not None}) > 1
    }
    if not panels:
        return None
    figure = Figure(figsize=(figures.COLUMN, 2.0 * len(panels)), layout="constrained")
    for place, (name, cost) in zip(
        figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True
    ):
        _panel(place, study, axis, groups, name, cost)
    note = "(lines: the best at that cost or less)" if len(study.axes) > 2 else ""
    axes_lib.legend(figure, axis, "-" if _is_joined(study, axis) else "", note)
    return figure


def _panel(
    panel: Axes,
    study: Study,
    axis: Axis,
    groups: Sequence[Group],
    name: str,
    cost: Callable[[Count], int],
) -> None:
    costs = [cost(group.size) for group in groups if group.size is not None]
    unit = max(unit for unit in _UNITS if unit <= max(1, min(costs) * 10))
    for value, look in zip(axis.values, axes_lib.looks(axis), strict=True):
        points = sorted(
            (cost(group.size) / unit, group.accuracy.mean, group.accuracy.std or math.nan)
            for group in groups
            if axis.value(group) == value and group.size is not None and group.accuracy is not None
        )
        if not points:
            continue
        xs, means, stds = zip(*points, strict=True)
        panel.errorbar(
            xs,
            means,
            stds,
            **look,
            linestyle="-" if _is_joined(study, axis) else "",
            linewidth=1.1,
            elinewidth=0.7,
            capsize=1.5,
            capthick=0.7,
            markersize=4,
            markeredgecolor="white",
            markeredgewidth=0.4,
        )
        if len(study.axes) > 2:
            steps = list(_best_so_far(xs, means))
            panel.plot(*zip(*steps, strict=True), color=look["color"], linewidth=0.9, alpha=0.7)
    figures.style(panel)
    _scale(panel, max(costs) / max(1, min(costs)))
    panel.set_xlabel(f"{name}{_UNITS[unit]}")
    panel.set_ylabel("top-1 accuracy (%)")


def _is_joined(study: Study, axis: Axis) -> bool:
    others = [other for other in study.axes if other is not axis]
    return len(others) == 1 and others[0].ordered


def _best_so_far(
    costs: Sequence[float], accuracies: Sequence[float]
) -> Iterator[tuple[float, float]]:
    """The points, in order of cost, than which nothing cheaper is better."""
    best = -math.inf
    for cost, accuracy in zip(costs, accuracies, strict=True):
        if accuracy > best:
            best = accuracy
            yield cost, accuracy


def _scale(panel: Axes, span: float) -> None:
    panel.margins(x=0.06, y=0.1)
    panel.yaxis.set_major_locator(MaxNLocator(5))
    if span < _LOG_RANGE:
        panel.xaxis.set_major_locator(MaxNLocator(5))
        return
    panel.set_xscale("log")
    subs = next(subs for most, subs in _TICKS if span < most)
    panel.xaxis.set_major_locator(LogLocator(subs=subs))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_major_formatter("{x:g}")
