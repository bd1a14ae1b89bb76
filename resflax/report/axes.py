"""How the values of what varies look in a figure: words, colours and markers."""

import textwrap
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from resflax import figures
from resflax.report.study import Axis, show

_MARKERS = "osD^vP*X"

# Of names of fields that vary together, so many stand for them all.
_MOST_FIELDS = 2

# Characters of a value; of a longer one, such as a path, the end tells more.
_LONGEST = 24

# Characters of the legend's type that fit in an inch.
_PER_INCH = 17

_WORDS = {"se": "SE", "bn": "BN", "lr": "learning rate", "ema": "EMA", "act": "activation"}


def title(axis: Axis) -> str:
    """What varies, in words: 'SE reduction'."""
    names = [
        " ".join(_WORDS.get(word, word) for word in name.replace(".", "_").split("_"))
        for name in axis.label.split(", ")
    ]
    return ", ".join(names[:_MOST_FIELDS]) + (", …" if len(names) > _MOST_FIELDS else "")


def name(value: tuple[Any, ...]) -> str:
    """A value of an axis: '20', or '4, 32' of two fields."""
    shown = (show(part) for part in value[:_MOST_FIELDS])
    return ", ".join(
        text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}" for text in shown
    )


def looks(axis: Axis) -> list[dict[str, Any]]:
    """Colour and marker for each value: numbers go from dark to light, words are distinct."""
    count = len(axis.values)
    colours: list[Any] = list(figures.COLOURS[:count])
    if axis.ordered or count > len(colours):
        # The last tenth of viridis is too light for lines on white.
        colours = [matplotlib.colormaps["viridis"](0.88 * i / (count - 1)) for i in range(count)]
    return [
        {"color": colour, "marker": _MARKERS[i % len(_MARKERS)]} for i, colour in enumerate(colours)
    ]


def legend(figure: Figure, axis: Axis, **style: Any) -> None:
    """Puts the names of an axis's values below the panels, where there are no lines to hide."""
    names = [name(value) for value in axis.values]
    handles = [
        Line2D([], [], **{**look, **style}, label=text)
        for text, look in zip(names, looks(axis), strict=True)
    ]
    width = _PER_INCH * figure.get_figwidth()
    columns = int(width / (max(map(len, names)) + 6))
    legend = figure.legend(
        handles=handles,
        title=textwrap.fill(title(axis), int(width)),
        loc="outside lower center",
        ncols=max(1, min(columns, len(names))),
        frameon=False,
        fontsize=figures.FONT - 1,
        title_fontsize=figures.FONT,
        labelcolor=figures.INK,
        handlelength=1.6,
        columnspacing=1.2,
        borderaxespad=0.2,
    )
    legend.get_title().set_color(figures.INK)
