"""Accuracy over two things that vary, as a map of colours with its numbers."""

import statistics
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from resflax import figures
from resflax.report import axes as axes_lib
from resflax.report.study import Axis, Group, Study

# Inches: a character of the names of values, a cell that has room for a number, and what stands
# beside the cells, the colour bar and the labels of the axes.
_CHARACTER, _CELL, _AROUND = 0.055, 0.42, 1.15

# Characters of a line of such a name, and of one that is short enough for a column.
_LINE, _SHORT = 25, 8


def draw(study: Study, first: Axis, second: Axis) -> Figure | None:
    """A figure with a cell for each pair of values; long names are those of rows.

    Where nothing else varies, a cell has the mean and the standard deviation over seeds; else the
    mean of the configurations' means, and how many there were where that is not all. Cells without
    a finished run are hatched.

    Returns:
      The figure; None if fewer than two cells have a number.
    """
    swap = _longest(second) > max(_SHORT, _longest(first))
    rows, columns = (second, first) if swap else (first, second)
    cells = [
        [_members(study, rows, row, columns, column) for column in columns.values]
        for row in rows.values
    ]
    means = np.array([[_mean(members) for members in line] for line in cells])
    if np.isfinite(means).sum() < 2:
        return None
    figure, upright = _figure(rows, columns)
    panel = figure.subplots()
    image = panel.imshow(means, cmap="cividis", aspect="auto")
    panel.patch.set(hatch="////", facecolor="white", edgecolor="#BBBBBB")
    most = max(len(members) for line in cells for members in line)
    for i, j in np.ndindex(means.shape):
        text = _text(cells[i][j], most, single=len(study.axes) == 2)
        _write(panel, image, i, j, float(means[i, j]), text)
    _ticks(panel, rows, columns, upright=upright)
    label = "top-1 accuracy (%)"
    if len(study.axes) > 2:
        label += f",\nmean of {most} configurations"
    _colour_bar(figure, image, label)
    return figure


def _figure(rows: Axis, columns: Axis) -> tuple[Figure, bool]:
    """A figure with room for names and numbers, and whether the columns' names stand upright."""
    beside = _AROUND + _CHARACTER * min(_LINE, _longest(rows))
    fits = _CELL * len(columns.values) <= figures.COLUMN - beside
    width = figures.COLUMN if fits else figures.PAGE
    per_cell = int((width - beside) / len(columns.values) / _CHARACTER)
    upright = _longest(columns) > per_cell
    below = 0.9 + upright * _CHARACTER * min(_LINE, _longest(columns))
    height = max(1.75, _CELL * len(rows.values) + below)
    return Figure(figsize=(width, height), layout="constrained"), upright


def _colour_bar(figure: Figure, image: AxesImage, label: str) -> None:
    bar = figure.colorbar(image, pad=0.02, aspect=8 * figure.get_figheight())
    bar.set_label(label, fontsize=figures.FONT, color=figures.INK)
    bar.ax.tick_params(labelsize=figures.FONT - 1, color=figures.INK, labelcolor=figures.INK)
    bar.outline.set_visible(False)


def _members(
    study: Study, rows: Axis, row: object, columns: Axis, column: object
) -> Sequence[Group]:
    return [
        group
        for group in study.groups
        if rows.value(group) == row and columns.value(group) == column
    ]


def _finished(members: Sequence[Group]) -> list[float]:
    return [group.accuracy.mean for group in members if group.accuracy is not None]


def _mean(members: Sequence[Group]) -> float:
    values = _finished(members)
    return statistics.fmean(values) if values else np.nan


def _text(members: Sequence[Group], most: int, *, single: bool) -> str:
    values = _finished(members)
    if not values:
        return ""
    text = f"{statistics.fmean(values):.2f}"
    if single and members[0].accuracy is not None and members[0].accuracy.std is not None:
        return f"{text}\n± {members[0].accuracy.std:.2f}"
    return f"{text}\n({len(values)} of {most})" if len(values) < most else text


def _write(panel: Axes, image: AxesImage, i: int, j: int, value: float, text: str) -> None:
    if not text:
        return
    red, green, blue, _ = image.to_rgba(np.array([value]))[0]
    is_light = 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
    panel.text(
        j,
        i,
        text,
        ha="center",
        va="center",
        fontsize=figures.FONT - 1,
        color="black" if is_light else "white",
    )


def _longest(axis: Axis) -> int:
    """Characters of the longest name of a value."""
    return max(len(axes_lib.name(value)) for value in axis.values)


def _names(axis: Axis) -> list[str]:
    return [textwrap.fill(axes_lib.name(value), _LINE) for value in axis.values]


def _ticks(panel: Axes, rows: Axis, columns: Axis, *, upright: bool) -> None:
    figures.style(panel)
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    panel.set_xticks(range(len(columns.values)), _names(columns), rotation=90 * upright)
    panel.set_yticks(range(len(rows.values)), _names(rows))
    panel.set_xlabel(axes_lib.title(columns))
    panel.set_ylabel(axes_lib.title(rows))
