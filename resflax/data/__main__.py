"""Data sets: prepare one, check its files, or see what the network is shown of it.

python -m resflax.data prepare NAME [--from DIR]
python -m resflax.data verify --config FILE.py [--config.data...]
python -m resflax.data show --config FILE.py [--output FILE.png]
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from resflax.data import location, prepare
from resflax.errors import UserError
from resflax.process import command, runtime
from resflax.process.arguments import path_option


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the command line asks for; returns the exit code."""
    parser = command.Parser(prog="python -m resflax.data", allow_abbrev=False)
    tasks = parser.add_subparsers(dest="task", required=True)
    task = tasks.add_parser("prepare", help="make a data set ready to be trained on")
    task.add_argument("name", help="fashion_mnist, from its files, or a data set of TFDS")
    task.add_argument("--from", dest="source", type=path_option, help="directory of IDX files")
    task.add_argument("--data-dir", type=path_option, help="where TFDS keeps data sets")
    task = tasks.add_parser("verify", help="read every image of a config's data set")
    task = tasks.add_parser("show", help="draw augmented training images with their labels")
    task.add_argument("--output", type=path_option, default=pathlib.Path("augmented.png"))
    options, rest = parser.parse_known_args(argv)
    try:
        if options.task == "prepare":
            if rest:
                command.fail(f"unexpected argument {rest[0]!r}.")
            return _prepare(options)
        if len(command.parse([parser.prog, *rest])) > 1:
            command.fail(f"unexpected argument {rest[-1]!r}; there is --config FILE.py.")
        # Imported now: what is wrong with the flags has been said before the libraries load.
        from resflax import validation
        from resflax.data import gallery, verification

        config = command.CONFIG.value
        validation.validate(config)
        if options.task == "verify":
            return verification.verify(config)
        gallery.draw(config, options.output)
        print(options.output)
        return 0
    except UserError as error:
        command.fail(str(error))


def _prepare(options: argparse.Namespace) -> int:
    if options.source is not None:
        if options.name != "fashion_mnist":
            command.fail(f"--from is for fashion_mnist, not {options.name!r}.")
        target = location.data_dir() / options.name
        print(prepare.fashion_mnist(options.source, target))
    else:
        print(prepare.tfds(options.name, options.data_dir))
    return 0


if __name__ == "__main__":
    runtime.configure()
    sys.exit(main())
