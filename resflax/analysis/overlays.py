"""Maps over images: a grid of images, each beside itself with its maps laid over it."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from resflax import figures

# Light where the map is high; as it is for the colour-blind, and in grey.
_COLOURS = "magma"
_OPACITY = 0.6
_DARKEST = 100  # of an image under a map, of 255

# Of the brightness as it is seen, of red, green and blue (ITU-R BT.601).
_BRIGHTNESS = (0.299, 0.587, 0.114)


def draw(images: np.ndarray, maps: Mapping[str, np.ndarray], titles: Sequence[str]) -> Figure:
    """Two images a row; the colours of a map go from its least value to its greatest.

    Args:
      images: uint8 [N, H, W, C].
      maps: by what they are called, [N, H', W'] each, for more images perhaps.
      titles: of the images.
    """
    groups = min(2, len(images))
    rows = -(-len(images) // groups)
    panels = len(maps) + 1
    # Between the groups there is a margin.
    widths = (([1] * panels + [0.15]) * groups)[:-1]
    margins = range(panels, len(widths), panels + 1)
    height, width = images.shape[1:3]
    panel = figures.PAGE / (2 * panels + 0.15)
    figure = Figure(
        figsize=(panel * sum(widths), rows * (panel * height / width + 0.2) + 0.5),
        layout=ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0),
    )
    grid = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for axes in grid.flat:
        axes.set_axis_off()
    shown = [i for i in range(len(widths)) if i not in margins]
    cells = grid[:, shown].reshape(rows * groups, panels)
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        _show(cells[i], image, [m[i] for m in maps.values()])
        cells[i][panels // 2].set_title(title, fontsize=figures.FONT, color=figures.INK, pad=2)
    for row in cells[(rows - 1) * groups : len(images)]:
        for axes, name in zip(row, ["image", *maps], strict=True):
            _name(axes, name)
    bar = figure.colorbar(
        ScalarMappable(cmap=_COLOURS), ax=grid, location="bottom", fraction=0.03, aspect=60
    )
    bar.set_ticks([0, 1], labels=["least of the map", "greatest"])
    first, last = bar.ax.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    bar.ax.tick_params(labelsize=figures.FONT - 1, labelcolor=figures.INK, length=0)
    bar.outline.set_visible(False)
    return figure


def _show(cells: Sequence[Axes], image: np.ndarray, maps: Sequence[np.ndarray]) -> None:
    height, width, channels = image.shape
    extent = (0.0, width, height, 0.0)
    colour = image if channels == 3 else np.repeat(image[..., :1], 3, axis=-1)
    cells[0].imshow(colour, interpolation="nearest", extent=extent)
    # In grey, so that the only colours are the map's, and not so dark that they are lost.
    grey = _DARKEST + (1 - _DARKEST / 255) * (colour @ np.asarray(_BRIGHTNESS))
    for axes, values in zip(cells[1:], maps, strict=True):
        axes.imshow(grey, "gray", interpolation="nearest", extent=extent, vmin=0, vmax=255)
        axes.imshow(
            values, _COLOURS, interpolation="bilinear", extent=extent, alpha=_OPACITY, aspect="auto"
        )
        axes.set_aspect("equal")


def _name(axes: Axes, name: str) -> None:
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_xlabel(name, fontsize=figures.FONT - 1, color=figures.INK, labelpad=2)
