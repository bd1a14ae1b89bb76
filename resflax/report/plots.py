"""The figures of a study, as PNG files."""

import itertools
import pathlib
import re
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from resflax import figures
from resflax.report import cost, heat_map, learning
from resflax.report.study import Axis, Study


def write(study: Study, directory: pathlib.Path) -> list[pathlib.Path]:
    """Draws everything that there is to draw.

    Args:
      study: of the runs.
      directory: made if it is not there; older pictures of the same names are replaced.

    Returns:
      The files.

    Raises:
      OSError: if one cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in draw(study):
        paths.append(directory / f"{name}.png")
        figures.save(figure, paths[-1])
    return paths


def draw(study: Study) -> Iterator[tuple[str, Figure]]:
    """The names of the figures, and them."""
    for axis in study.axes:
        if (figure := cost.draw(study, axis)) is not None:
            yield f"accuracy_by_{_slug(axis)}", figure
    lines: Sequence[Axis | None] = study.axes or (None,)
    for line in lines:
        pages = list(learning.draw(study, line))
        for number, figure in enumerate(pages, 1):
            name = "curves" if line is None else f"curves_by_{_slug(line)}"
            yield f"{name}_{number}" if len(pages) > 1 else name, figure
    for rows, columns in itertools.combinations(study.axes, 2):
        if (figure := heat_map.draw(study, rows, columns)) is not None:
            yield f"heat_map_{_slug(rows)}_{_slug(columns)}", figure


def _slug(axis: Axis) -> str:
    return re.sub(r"\W", "_", axis.labels[0])
