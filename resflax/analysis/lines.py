"""Lines over the layers or blocks of networks, a line for each network."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resflax import figures

# By the name of a network, its values.
Lines = Mapping[str, Sequence[float]]


# As many times the least value, the greatest makes an axis logarithmic.
_MOST = 100

# Width of one in the legend, inches.
_LETTER = 0.062


def draw(panels: Sequence[tuple[str, str, Lines]]) -> Figure:
    """Panels side by side: the label of x, the label of y, and the lines of each.

    Args:
      panels: all have the networks of the first, or some of them; their colours are the same.
    """
    names = list(dict.fromkeys(name for _, _, lines in panels for name in lines))
    columns = legend_columns(names)
    height = 2.5 + 0.17 * math.ceil(len(names) / columns)
    figure = Figure(figsize=(figures.PAGE, height), layout="constrained")
    handles = {}
    for axes, (x_label, y_label, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figures.style(axes)
        for name, values in lines.items():
            number = names.index(name)
            colour = figures.COLOURS[number % len(figures.COLOURS)]
            style = ("-", "--", ":")[number // len(figures.COLOURS) % 3]
            places = range(1, len(values) + 1)
            (handles[name],) = axes.plot(
                places, values, style, color=colour, linewidth=1.2, marker=".", markersize=3
            )
        axes.set_xlim(0.5, max(map(len, lines.values())) + 0.5)
        _scale(axes, np.concatenate([*lines.values()]))
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(
        handles.values(),
        handles,
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        fontsize=figures.FONT - 1,
    )
    return figure


def legend_columns(names: Sequence[str]) -> int:
    """As many as a page has room for, three at most."""
    return max(1, min(3, int(figures.PAGE / (0.5 + _LETTER * max(map(len, names))))))


def _scale(axes: Axes, values: np.ndarray) -> None:
    least, greatest = np.nanmin(values), np.nanmax(values)
    if 0 < _MOST * least < greatest < np.inf:
        figures.logarithmic(axes)
    elif np.isfinite(greatest):
        # As much as one where all are zero.
        axes.set_ylim(0, 1.08 * greatest or 1.0)
