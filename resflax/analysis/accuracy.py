"""The accuracy of finished runs, against what their networks cost."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from resflax import figures
from resflax.analysis import bars
from resflax.errors import UserError
from resflax.run import workdir as workdir_lib

_MARKERS = "osD^vPXd"

# Of the greatest cost over the least, from which an axis is logarithmic.
_LOG_RANGE = 4.0


class Point(NamedTuple):
    """A run: its name, what its network costs for an image, and its final top-1, a share."""

    name: str
    macs: int
    params: int
    top1: float


def read(workdir: str | pathlib.Path) -> float | None:
    """The top-1 of a run after its last step, a share; None if it has not finished.

    Raises:
      UserError: if there is a file of the result that cannot be read.
    """
    workdir = pathlib.Path(workdir).expanduser()
    try:
        result = workdir_lib.read_result(workdir)
    except workdir_lib.WorkdirError as error:
        raise UserError(f"{workdir}: {error}") from None
    return None if result is None else result["eval/top1"]


def draw(points: Sequence[Point]) -> Figure:
    """Top-1 against multiply-adds and against parameters, a point for each run."""
    columns = 3
    height = 2.6 + 0.16 * -(-len(points) // columns)
    figure = Figure(figsize=(figures.PAGE, height), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, field, label in zip(
        panels, ("macs", "params"), ("multiply-adds for an image", "parameters"), strict=True
    ):
        costs = [getattr(point, field) for point in points]
        unit, word = bars.unit(max(costs))
        axes.set_xlabel(bars.quantity(label, word))
        for i, (point, cost) in enumerate(zip(points, costs, strict=True)):
            colour = figures.COLOURS[i % len(figures.COLOURS)]
            marker = _MARKERS[i % len(_MARKERS)]
            percent = 100 * point.top1
            axes.plot(cost / unit, percent, marker, color=colour, markersize=5, label=point.name)
        figures.style(axes)
        if max(costs) > _LOG_RANGE * min(costs):
            axes.set_xscale("log")
        axes.margins(0.1)
    panels[0].set_ylabel("top-1 accuracy, %")
    low, high = panels[0].get_ylim()
    # No accuracy is above it, but half a marker.
    panels[0].set_ylim(low, min(high, 100 + 0.03 * (100 - low)))
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=min(columns, len(points)),
        frameon=False,
        fontsize=figures.FONT - 1,
    )
    return figure
