"""Learning curves of a run, read from its metrics file and drawn as one PNG figure."""

import json
import math
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resflax import figures
from resflax.errors import UserError
from resflax.figures import FONT, INK

_TRAIN, _EVAL, _RATE = figures.COLOURS[:3]
_LOG_DECADES = 1.5  # a wider range of losses gets a logarithmic axis
_MAX_MARKERS = 40  # more evaluations than this would merge into a band

Metrics = Sequence[Mapping[str, float]]


def read_metrics(
    path: pathlib.Path, report: Callable[[str], None] | None = None
) -> list[dict[str, float]]:
    """Reads a metrics file and resolves the steps that a resumed run wrote again.

    A line that goes back to an earlier step, or repeats a step for the same kind of line (train
    or eval), supersedes all earlier lines from that step on. The train and the eval line of one
    step stand side by side. A last line without its end is ignored.

    Args:
      path: a file with one JSON object a line, each with a "step" and an "epoch".
      report: called with a line about every other line that is not one, which is left out; None:
        such a line is an error.

    Returns:
      The lines in order of step, with their numeric entries only.

    Raises:
      OSError: the file cannot be read.
      UserError: it is no file; or a line other than the last is not a JSON object with a step and
        an epoch, and there is no `report`.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file.")  # a device may have no end
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    whole = len(lines) if text.endswith("\n") else len(lines) - 1
    kept: list[dict[str, float]] = []
    for number, content in enumerate(lines, start=1):
        try:
            line = _parse(content)
        except ValueError as error:
            if number > whole:
                break
            if report is None:
                raise UserError(f"{path}, line {number}: {error}") from error
            report(f"{path}, line {number}, is left out: {error}.")
            continue
        add(line, kept)
    return kept


def add(line: dict[str, float], kept: list[dict[str, float]]) -> None:
    """Appends a line to those of `read_metrics`, in the place of the ones that it supersedes."""
    # At one step there is at most one line of either kind, so two lines back is far enough.
    if any(_supersedes(line, old) for old in kept[-2:]):
        while kept and kept[-1]["step"] >= line["step"]:
            kept.pop()
    kept.append(line)


def plot_curves(metrics: Metrics, path: pathlib.Path, *, title: str = "") -> None:
    """Draws loss, top-1 accuracy (%) and learning rate over epochs into a PNG file.

    The file appears whole or not at all: it is written beside `path` and then renamed. Values
    that are not finite are left out of the curves.

    Args:
      metrics: lines as `read_metrics` returns them, with accuracies as fractions in [0, 1].
      path: the PNG file to write or replace; its folder exists.
      title: text above the panels; none if empty.

    Raises:
      OSError: the file cannot be written.
      UserError: there are no metrics.
    """
    if not metrics:
        raise UserError("no metrics to plot")
    figures.save(_draw(metrics, title), path)


def _parse(text: str) -> dict[str, float]:
    try:
        line = json.loads(text)
    except RecursionError:
        line = None
    items = line.items() if isinstance(line, dict) else ()
    numbers = {key: value for key, value in items if _is_number(value)}
    if not all(math.isfinite(numbers.get(name, math.nan)) for name in ("step", "epoch")):
        raise UserError("not a JSON object with a step and an epoch")
    return numbers


def _is_number(value: Any) -> bool:
    """Whether it is one that numpy takes."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _supersedes(line: dict[str, float], old: dict[str, float]) -> bool:
    same_kind = ("eval/loss" in line) == ("eval/loss" in old)
    return line["step"] <= old["step"] if same_kind else line["step"] < old["step"]


def _series(metrics: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the epochs and the values of one entry, both [n], without non-finite values."""
    finite = [line for line in metrics if math.isfinite(line.get(key, math.nan))]
    return np.array([line["epoch"] for line in finite]), np.array([line[key] for line in finite])


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns a centred mean over about 4% of the points, [n] to [n].

    The window shrinks at both ends to a few points, so that it neither bends a steep curve there
    nor ends in the noise of one point. Two passes make it a triangle, which leaves no corners.
    """
    index = np.arange(len(values))
    widest = max(1, len(values) // 50)
    reach = np.clip(np.minimum(index, index[::-1]), min(widest // 2, 8), widest)
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    for _ in range(2):
        total = np.concatenate([[0.0], np.cumsum(values)])
        values = (total[high] - total[low]) / (high - low)
    return values


def _draw(metrics: Metrics, title: str) -> Figure:
    panels = {_loss_panel: 3.0, _accuracy_panel: 3.0, _rate_panel: 1.5}
    if any("analysis/step" in line for line in metrics):
        panels[_gradient_panel] = 3.0
    heights = list(panels.values())
    figure = Figure(figsize=(figures.COLUMN, 0.65 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights)
    for axis, panel in zip(axes, panels, strict=True):
        panel(axis, metrics)
        _style(axis)
    last = max(line["epoch"] for line in metrics) or 1.0
    axes[-1].set_xlim(-0.02 * last, 1.03 * last)  # room for a marker at either end
    axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes[-1].set_xlabel("epoch", fontsize=FONT, color=INK)
    figure.align_ylabels(axes)
    if title:
        text = textwrap.fill(title, 44)
        figure.suptitle(text, fontsize=FONT + 1, weight="bold", color=INK, parse_math=False)
    return figure


def _style(axis: Axes) -> None:
    figures.style(axis)
    if axis.get_legend_handles_labels()[0]:
        # Above the panel: inside it, no corner is free of lines in every run.
        axis.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            borderaxespad=0.1,
            ncols=2,
            frameon=False,
            columnspacing=1.2,
            fontsize=FONT - 1,
            labelcolor=INK,
            handlelength=1.6,
        )


def _line(axis: Axes, epochs: np.ndarray, values: np.ndarray, few: int, **style: Any) -> None:
    """Draws values over epochs, both [n], with markers if there are at most `few` points."""
    if len(values):
        style = {"linewidth": 1.2, "marker": "o" if len(values) <= few else "", **style}
        axis.plot(epochs, values, markersize=2.5, **style)


def _pair(axis: Axes, metrics: Metrics, name: str, scale: float, alpha: float) -> None:
    epochs, values = _series(metrics, f"train/{name}")
    _line(axis, epochs, scale * values, 1, color=_TRAIN, linewidth=0.5, alpha=0.3 * alpha)
    _line(axis, epochs, scale * _smooth(values), 1, color=_TRAIN, alpha=alpha, label="train")
    epochs, values = _series(metrics, f"eval/{name}")
    _line(axis, epochs, scale * values, _MAX_MARKERS, color=_EVAL, label="evaluation")


def _loss_panel(axis: Axes, metrics: Metrics) -> None:
    _pair(axis, metrics, "loss", scale=1.0, alpha=1.0)
    drawn = np.concatenate([[], *(line.get_ydata() for line in axis.lines)])
    positive = drawn[drawn > 0]
    if len(positive) and math.log10(positive.max() / positive.min()) > _LOG_DECADES:
        figures.logarithmic(axis)
    axis.set_ylabel("loss (nats)")


def _accuracy_panel(axis: Axes, metrics: Metrics) -> None:
    _pair(axis, metrics, "top1", scale=100.0, alpha=0.6)
    for line in axis.lines:
        line.set_label("_")  # the legend of the loss panel names them
    axis.set_ylabel("top-1 accuracy (%)")
    epochs, values = _series(metrics, "eval/top1")
    if len(values):
        best = np.flatnonzero(values == values.max())[-1]
        epoch, top1 = epochs[best], 100 * values[best]
        label = f"best {top1:.2f}% at epoch {epoch:.1f}".removesuffix(".0")
        axis.plot(epoch, top1, "*", color=_EVAL, markersize=9, mec="white", mew=0.6, label=label)


def _rate_panel(axis: Axes, metrics: Metrics) -> None:
    epochs, values = _series(metrics, "train/lr")
    _line(axis, epochs, values, 1, color=_RATE)
    highest = values.max(initial=0.0) or 1.0
    axis.set_ylim(-0.05 * highest, 1.1 * highest)
    axis.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_ylabel("learning rate")


def _gradient_panel(axis: Axes, metrics: Metrics) -> None:
    """The gradient at every block's input, from the first block, dark, to the last, light."""
    first = next(line for line in metrics if "analysis/step" in line)
    blocks = [name for name in first if name.startswith("analysis/gradient/")]
    for number, name in enumerate(blocks):
        colour = matplotlib.colormaps["viridis"](0.9 * number / max(1, len(blocks) - 1))
        label = name.rpartition("/")[2] if number in (0, len(blocks) - 1) else None
        _line(axis, *_series(metrics, name), 1, color=colour, linewidth=0.8, label=label)
    figures.logarithmic(axis)
    axis.set_ylabel("gradient at a block's input")
