"""How the values of what varies look in a figure: words, colours and markers."""

import textwrap
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from resflax import figures
from resflax.report.study import Axis, show

_MARKERS = "osD^vPXd"

# Of names of fields that vary together, so many stand for them all.
_MOST_FIELDS = 2

# Characters of a value; of a longer one, such as a path, the end tells more.
_LONGEST = 24

# Of the legend: characters of its type that fit in an inch, those that a marker and its margins
# take, and the height of a line and of the rest, inches.
_PER_INCH, _AROUND, _LINE, _REST = 18, 5, 0.145, 0.3

_WORDS = {"se": "SE", "bn": "BN", "lr": "learning rate", "ema": "EMA", "act": "activation"}


def title(axis: Axis) -> str:
    """What varies, in words: 'SE reduction'."""
    names = list(map(_words, axis.labels))
    return ", ".join(names[:_MOST_FIELDS]) + (", …" if len(names) > _MOST_FIELDS else "")


def name(value: tuple[Any, ...]) -> str:
    """A value of an axis: '20', or '4, 32' of two fields."""
    return ", ".join(map(_shortened, value[:_MOST_FIELDS]))


def setting(axis: Axis, value: tuple[Any, ...]) -> str:
    """An axis and one of its values: 'depth 20', or 'cardinality 4, base width 32'."""
    pairs = list(zip(axis.labels, value, strict=True))[:_MOST_FIELDS]
    return ", ".join(f"{_words(label)} {_shortened(part)}" for label, part in pairs)


def _words(label: str) -> str:
    return " ".join(_WORDS.get(word, word) for word in label.replace(".", "_").split("_"))


def _shortened(part: Any) -> str:
    text = show(part)
    return text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"


def looks(axis: Axis) -> list[dict[str, Any]]:
    """Colour and marker for each value: numbers go from dark to light, words are distinct."""
    count = len(axis.values)
    # There is one colour less than there are markers: no pair of them comes twice in 56.
    colours: list[Any] = [figures.COLOURS[i % len(figures.COLOURS)] for i in range(count)]
    if axis.ordered:
        # The last part of viridis is too light for lines on white.
        colours = [matplotlib.colormaps["viridis"](0.82 * i / (count - 1)) for i in range(count)]
    return [
        {"color": colour, "marker": _MARKERS[i % len(_MARKERS)]} for i, colour in enumerate(colours)
    ]


def legend(figure: Figure, axis: Axis, linestyle: Any, note: str = "") -> None:
    """Makes a figure taller by a legend below the panels, where there are no lines to hide.

    Args:
      figure: with its panels.
      axis: whose values are named.
      linestyle: of the lines through the markers; "": none.
      note: another line above the names.
    """
    names = [name(value) for value in axis.values]
    handles = [
        Line2D([], [], **look, linestyle=linestyle, linewidth=1.1, markersize=4, label=text)
        for text, look in zip(names, looks(axis), strict=True)
    ]
    width = _PER_INCH * figure.get_figwidth()
    columns = max(1, min(int(width / (max(map(len, names)) + _AROUND)), len(names)))
    lines = [*textwrap.wrap(title(axis), int(width)), *textwrap.wrap(note, int(width))]
    height = _REST + _LINE * (len(lines) - 1 - (-len(names) // columns))
    figure.set_figheight(figure.get_figheight() + height)
    legend = figure.legend(
        handles=handles,
        title="\n".join(lines),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=figures.FONT - 1,
        title_fontsize=figures.FONT,
        labelcolor=figures.INK,
        handlelength=1.6,
        columnspacing=1.2,
        borderaxespad=0.2,
    )
    legend.get_title().set(color=figures.INK, ha="center")
