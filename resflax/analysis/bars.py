"""What networks cost, as a bar for each, stacked by stage."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resflax import figures

_UNITS = {1: "", 10**3: "thousand", 10**6: "million", 10**9: "billion"}

# The name of each network, and multiply-adds and parameters of its stages, by name.
Costs = Sequence[tuple[str, Mapping[str, tuple[int, int]]]]

# Stages that a legend tells apart; of more, their names stand in the bars.
_LEGEND = 12

# Viridis is too light for white paper beyond it, and for white letters beyond the second.
_LIGHTEST, _DARK = 0.95, 0.6

# Characters of a name in a bar to an inch, and inches of a panel at least.
_PER_INCH, _PANEL = 20, 2.3


def draw(networks: Costs) -> Figure:
    """Multiply-adds and parameters, a panel each."""
    stages = list(dict.fromkeys(stage for _, costs in networks for stage in costs))
    named = len(stages) > _LEGEND
    columns = min(8, len(stages))
    legend = 0.0 if named else 0.16 * -(-len(stages) // columns)
    height = 0.26 * len(networks) + 0.65 + legend
    figure = Figure(figsize=(figures.PAGE, height), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    labels = "multiply-adds for an image", "parameters"
    for number, (axes, label) in enumerate(zip(panels, labels, strict=True)):
        costs = [{stage: c[number] for stage, c in costs.items()} for _, costs in networks]
        size, word = unit(max(sum(c.values()) for c in costs))
        axes.set_xlabel(quantity(label, word))
        figures.style(axes)
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
        end = 1.03 * max(sum(c.values()) for c in costs) / size
        room = end / (_PANEL * _PER_INCH) if named else math.inf
        for place, cost in enumerate(costs):
            values = {stage: value / size for stage, value in cost.items()}
            _bar(axes, place, values, list(values) if named else stages, room)
        axes.set_ylim(len(networks) - 0.4, -0.6)
        axes.set_xlim(0, end)
    panels[0].set_yticks(range(len(networks)), [name for name, _ in networks])
    if not named:
        _legend(figure, panels[0], stages, columns)
    return figure


def unit(greatest: float) -> tuple[int, str]:
    """What numbers up to the greatest are divided by to be readable, and its name."""
    return max(item for item in _UNITS.items() if item[0] <= max(1, greatest))


def quantity(name: str, word: str) -> str:
    """The label of an axis: 'parameters, millions'."""
    return f"{name}, {word}s" if word else name


def _legend(figure: Figure, axes: Axes, stages: Sequence[str], columns: int) -> None:
    handles, texts = axes.get_legend_handles_labels()
    found = dict(zip(texts, handles, strict=True))
    figure.legend(
        [found[stage] for stage in stages],
        stages,
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        fontsize=figures.FONT - 1,
        handlelength=1,
        columnspacing=1.2,
    )


def _bar(
    axes: Axes, place: int, values: Mapping[str, float], stages: Sequence[str], room: float
) -> None:
    """A bar in pieces, from dark to light in the order of the stages.

    Args:
      axes: the panel.
      place: of the bar.
      values: of its pieces.
      stages: of all bars with these colours.
      room: that a character of a piece's name takes; pieces that are too narrow have no names.
    """
    shades = np.linspace(0, _LIGHTEST, len(stages))
    start = 0.0
    for stage, value in values.items():
        shade = shades[stages.index(stage)]
        axes.barh(
            place,
            value,
            0.7,
            start,
            color=matplotlib.colormaps["viridis"](shade),
            edgecolor="white",
            linewidth=0.4,
            label=stage,
        )
        if value > room * len(stage):
            ink = "white" if shade < _DARK else "black"
            middle, size = start + value / 2, figures.FONT - 2
            axes.text(middle, place, stage, color=ink, fontsize=size, ha="center", va="center")
        start += value
