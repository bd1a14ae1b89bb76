"""Runs a config's sweep: python -m launch.sweep --config configs/resnet.py[:shapes] --workdir DIR.

Each combination that the config's `sweep()` yields becomes a run in DIR, named after its values.
Finished runs are skipped, interrupted and failed ones go on, so the same command completes a sweep.
Exit code 0: all runs are done; 1: some failed; 2: bad input; 130: stopped.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from launch import runs
from resflax.errors import UserError
from resflax.process import command
from resflax.process.arguments import path_option

# Modules, imported when they are asked for, with `submit(runs, options) -> exit code` and
# `add_arguments(parser)` for the options of their own. Bad input raises UserError there.
EXECUTORS = {
    "local": "launch.here",
    "slurm": "launch.slurm",
    "kubernetes": "launch.kubernetes",
    "print": "launch.printing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sweep of the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    choice = command.Parser(add_help=False, allow_abbrev=False)
    choice.add_argument(
        "--executor", choices=EXECUTORS, default="local", help="where they run; default: local"
    )
    name = choice.parse_known_args(argv)[0].executor
    try:
        executor = importlib.import_module(EXECUTORS[name])
    except ModuleNotFoundError as error:
        command.fail(f'--executor {name} needs {error.name}: pip install "resflax[{name}]".')
    parser = _parser(choice)
    executor.add_arguments(parser.add_argument_group(f"--executor {name}"))
    options = parser.parse_args(argv)
    try:
        expanded = runs.expand(
            options.config,
            options.workdir,
            filters=options.filter,
            seeds=options.seeds,
            overrides=dict(options.override),
        )
        return executor.submit(expanded, options)
    except UserError as error:
        command.fail(error)


def _parser(choice: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What every executor has, beside the choice of one."""
    parser = command.Parser(
        prog="python -m launch.sweep",
        description=__doc__.partition(":")[0] + ".",
        parents=[choice],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py[:DATASET]", help="with get_config and sweep")
    add(
        "--workdir",
        required=True,
        type=path_option,
        metavar="DIR",
        help="of all the runs",
    )
    add(
        "--filter",
        action="append",
        default=[],
        type=_assignment,
        metavar="FIELD=VALUE",
        help="keep these runs, such as model.depth=20; repeat for more values, or more fields",
    )
    add(
        "--seeds",
        type=_seeds,
        default=(),
        metavar="N,N,...",
        help="repeat each run with each of them",
    )
    add(
        "--override",
        action="append",
        default=[],
        type=_assignment,
        metavar="FIELD=VALUE",
        help="of the config, in all runs, such as train.epochs=2; repeat for more",
    )
    return parser


def _assignment(text: str) -> tuple[str, str]:
    field, equals, value = text.partition("=")
    if not (field and equals):
        raise argparse.ArgumentTypeError(f"{text!r} must be FIELD=VALUE.")
    return field.removeprefix("config."), value


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be integers, such as 0,1,2.") from None
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} has one twice.")
    return seeds


if __name__ == "__main__":
    sys.exit(main())
