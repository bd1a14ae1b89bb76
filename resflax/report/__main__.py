"""Tables and plots of what came out of runs: python -m resflax.report DIR... [--plots DIR].

A directory under DIR with a config.json is a run. Runs are grouped by the fields that vary between
their configs, except the seed. Bad input ends with one line and exit code 2.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax
import rich.console

from resflax.report import plots, runs, study, table
from resflax.workdir import write_atomically

# Of the table where there is no terminal that would have one, characters.
_PLAIN_WIDTH = 140

_FORMATS = {"markdown": table.markdown, "html": table.page}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Reports what the command line asks for; returns the exit code."""
    parser = _Parser(
        prog="python -m resflax.report",
        description=__doc__.partition(":")[0] + ".",
        allow_abbrev=False,
    )
    parser.add_argument("directories", nargs="+", type=pathlib.Path, metavar="DIR")
    for name in (*_FORMATS, "csv"):
        parser.add_argument(f"--{name}", type=pathlib.Path, metavar="FILE", help="write the table")
    parser.add_argument("--plots", type=pathlib.Path, metavar="DIR", help="write PNGs there")
    options = parser.parse_args(argv)
    # Only shapes are computed here, and the accelerators may be at work on the runs.
    jax.config.update("jax_platforms", "cpu")
    try:
        compared = study.compare(runs.find(options.directories))
        _print(compared)
        _write(compared, options)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename or options.plots}: {error.strerror}.")
    return 0


def _print(compared: study.Study) -> None:
    console = rich.console.Console(highlight=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    console.print(table.terminal(compared))
    console.print(table.LEGEND, style="dim", markup=False)
    for path, note in compared.notes:
        console.print(f"{path}: {note}", soft_wrap=True, markup=False)


def _write(compared: study.Study, options: argparse.Namespace) -> None:
    pictures = plots.write(compared, options.plots) if options.plots else []
    for name, text in _FORMATS.items():
        if path := getattr(options, name):
            path.parent.mkdir(parents=True, exist_ok=True)
            links = [os.path.relpath(picture, path.parent) for picture in pictures]
            write_atomically(path, text(compared, links))
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.csv, table.comma_separated(compared))
    for picture in pictures:
        print(picture)


if __name__ == "__main__":
    sys.exit(main())
