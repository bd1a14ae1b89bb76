"""Tables and plots of what came out of runs: python -m resflax.report DIR... [--plots DIR].

A directory under DIR with a config.json is a run. Runs are grouped by the fields that vary between
their configs, except the seed. Bad input ends with one line and exit code 2.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

import jax
import rich.console

from resflax.errors import UserError
from resflax.parts import CONFIG_FILE_HELP, NONE, Parts
from resflax.process import command
from resflax.process.arguments import path_option
from resflax.report import plots, runs, study, table
from resflax.run.workdir import write_atomically

_FORMATS = {"markdown": table.markdown, "html": table.page}


def main(argv: Sequence[str] | None = None) -> int:
    """Reports what the command line asks for; returns the exit code."""
    parser = command.Parser(
        prog="python -m resflax.report",
        description=__doc__.partition(":")[0] + ".",
        allow_abbrev=False,
    )
    parser.add_argument("directories", nargs="+", type=path_option, metavar="DIR")
    for name in (*_FORMATS, "csv"):
        parser.add_argument(f"--{name}", type=path_option, metavar="FILE", help="write the table")
    parser.add_argument("--plots", type=path_option, metavar="DIR", help="write PNGs there")
    parser.add_argument("--config_file", metavar="FILE.py", help=CONFIG_FILE_HELP)
    options = parser.parse_args(argv)
    # Only shapes are computed here, and the accelerators may be at work on the runs.
    jax.config.update("jax_platforms", "cpu")
    console = rich.console.Console(highlight=False)
    try:
        own = NONE if options.config_file is None else Parts.of_file(options.config_file)
        compared = study.compare(runs.find(options.directories), own)
        _show(compared, console)
        pictures = _write(compared, options)
    except UserError as error:
        command.fail(error)
    for picture in pictures:
        console.print(picture, soft_wrap=True, markup=False)
    return 0


def _show(compared: study.Study, console: rich.console.Console) -> None:
    console.print(table.summary(compared), style="bold", soft_wrap=True, markup=False)
    table.show(compared, console)
    legend = table.legend(compared)
    console.print(legend, style="dim", soft_wrap=not console.is_terminal, markup=False)
    for path, note in compared.notes:
        console.print(f"{path}: {note}", soft_wrap=True, markup=False)


def _write(compared: study.Study, options: argparse.Namespace) -> list[pathlib.Path]:
    """Writes the files that were asked for; returns the pictures.

    Raises:
      UserError: if one cannot be written.
    """
    try:
        pictures = plots.write(compared, options.plots) if options.plots else []
        for name, text in _FORMATS.items():
            if path := getattr(options, name):
                path.parent.mkdir(parents=True, exist_ok=True)
                links = [os.path.relpath(picture, path.parent) for picture in pictures]
                write_atomically(path, text(compared, links))
        if options.csv:
            options.csv.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(options.csv, table.comma_separated(compared))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}.") from None
    return pictures


if __name__ == "__main__":
    sys.exit(main())
