"""What an analysis found: numbers by row, remarks in words, and figures; and how it is kept."""

import csv
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table
from matplotlib.figure import Figure

from resflax import figures
from resflax.errors import UserError


class NothingError(UserError):
    """A network has no part that the analysis is about; the message names networks that have."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What an analysis found.

    Attributes:
      name: of the analysis; the files are named after it.
      rows: for the CSV file and the printed table; all have the same columns.
      remarks: in words, a line each.
      figures: by what is added to the name, '' for the main one.
      columns: those that are printed; None: all; (): no table.
      tables: other rows, which are not printed, by what is added to the name of their CSV file.
    """

    name: str
    rows: Sequence[dict[str, Any]]
    remarks: Sequence[str]
    figures: dict[str, Figure]
    columns: Sequence[str] | None = None
    tables: Mapping[str, Sequence[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    def write(self, folder: pathlib.Path) -> list[pathlib.Path]:
        """Writes the CSV files and a PNG for each figure; older files of these names are replaced.

        Raises:
          OSError: if one cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for suffix, rows in {"": self.rows, **self.tables}.items():
            paths.append(folder / (f"{self.name}_{suffix}.csv" if suffix else f"{self.name}.csv"))
            with paths[-1].open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        for suffix, figure in self.figures.items():
            paths.append(folder / (f"{self.name}_{suffix}.png" if suffix else f"{self.name}.png"))
            figures.save(figure, paths[-1])
        return paths

    def print(self, console: rich.console.Console) -> None:
        """Prints the table, and the remarks under it; the name of a single network is in these."""
        columns = list(self.rows[0] if self.columns is None else self.columns)
        if "network" in columns and len({row["network"] for row in self.rows}) == 1:
            columns.remove("network")
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
        for column in columns:
            numeric = all(not isinstance(row[column], str) for row in self.rows)
            table.add_column(column, justify="right" if numeric else "left")
        for row in self.rows:
            table.add_row(*(_shown(row[column]) for column in columns))
        if columns:
            console.print(table)
        for remark in self.remarks:
            console.print(remark)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
