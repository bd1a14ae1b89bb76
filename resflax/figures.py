"""How the figures look: colours, type and axes, and how a figure becomes a file."""

import io
import pathlib

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterMathtext, LogLocator, NullFormatter

from resflax import disk

# Okabe-Ito colours, the yellow left out, which white paper swallows: distinct under the common
# forms of colour blindness and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK = "#333333"
FONT = 8  # points
COLUMN, PAGE = 3.5, 7.0  # widths of a figure in one column of a page and in both, inches


def style(axes: Axes) -> None:
    """Gives one panel the look of them all."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=INK, linewidth=0.6)
    axes.tick_params(labelsize=FONT - 1, color=INK, labelcolor=INK, width=0.6, length=2.5)
    axes.grid(color="#E3E3E3", linewidth=0.5)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=FONT, color=INK)


def logarithmic(axes: Axes) -> None:
    """Gives a panel a logarithmic ordinate with labels such as 0.3, 1, 3, 10."""
    axes.set_yscale("log", nonpositive="mask", subs=[])
    low, high = axes.get_ylim()
    # Where there are many decades, every one, or some of them.
    few = low > 0 and high / low < 1e4
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if few else (1.0,), numticks=8))
    axes.yaxis.set_major_formatter("{x:g}" if few else LogFormatterMathtext())
    # Else it labels decades that the major ticks leave out, in another size.
    axes.yaxis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a PNG of 300 dots an inch, whole or not at all: beside `path`, and then renamed.

    Args:
      figure: what to write.
      path: the file to write or replace; its folder exists.

    Raises:
      OSError: it cannot be written.
    """
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(picture, format="png", dpi=300, facecolor="white")
    # A picture can be drawn again, and is not worth a wait for the disk.
    disk.write(path, picture.getvalue(), durable=False)
