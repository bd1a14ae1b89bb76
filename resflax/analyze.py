"""Looks into networks: python -m resflax.analyze WHAT --model NAME | --workdir DIR.

python -m resflax.analyze signal --model cifar_resnet56 --set shortcut=none,A,B
"""

import argparse
import collections
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import rich.console

from resflax.analysis import (
    arguments,
    cam,
    complexity,
    excitation,
    landscape,
    lesion,
    responses,
    signal,
    subject,
    units,
)
from resflax.analysis.result import Result
from resflax.errors import UserError
from resflax.parts import CONFIG_FILE_HELP, Parts
from resflax.process import command, runtime
from resflax.process.arguments import assignment, path_option, value, values


class What(NamedTuple):
    """An analysis.

    Attributes:
      run: from subjects and the command line's options to what was found.
      add_arguments: of its own.
      help: a line.
      images: how many it looks at, unless the command line says.
    """

    run: Callable[[Sequence[subject.Subject], argparse.Namespace], Result]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    help: str
    images: int


WHATS = {
    "signal": What(signal.run, signal.add_arguments, "variances and gradients by block", 64),
    "units": What(units.run, units.add_arguments, "dead and saturated units by block", 128),
    "responses": What(
        responses.run, responses.add_arguments, "how strongly each layer responds", 128
    ),
    "excitation": What(
        excitation.run, excitation.add_arguments, "squeeze-excite gates by class and stage", 128
    ),
    "lesion": What(lesion.run, lesion.add_arguments, "accuracy without some blocks", 256),
    "landscape": What(landscape.run, landscape.add_arguments, "loss around the parameters", 64),
    "cam": What(cam.run, cam.add_arguments, "where the evidence for a class is", 8),
    "complexity": What(complexity.run, complexity.add_arguments, "what each stage costs", 1),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Analyses what the command line names; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    what = WHATS[options.what]
    try:
        result = what.run(_subjects(options, options.images or what.images), options)
    except UserError as error:
        command.fail(error)
    console = rich.console.Console(highlight=False)
    result.print(console)
    folder = options.out or _folder(options)
    try:
        paths = result.write(folder)
    except OSError as error:
        parser.error(f"{folder} cannot be written to: {error.strerror}.")
    names = ", ".join(path.name for path in paths)
    console.print(f"{folder}: {names}", soft_wrap=True)
    return 0


def _parser() -> command.Parser:
    parser = command.Parser(prog="python -m resflax.analyze", description=__doc__.split(":")[0])
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, what in WHATS.items():
        one = commands.add_parser(name, help=what.help, description=what.help)
        add = one.add_argument
        add("--model", action="append", default=[], metavar="NAME", help="untrained; repeat")
        add(
            "--workdir",
            action="append",
            default=[],
            type=path_option,
            metavar="DIR",
            help="of a run; repeat",
        )
        add(
            "--set",
            action="append",
            type=assignment,
            default=[],
            metavar="ARG=V[,V...]",
            help="of the untrained: every combination of values",
        )
        add(
            "--data",
            action="append",
            type=assignment,
            default=[],
            metavar="FIELD=V",
            help="of config.data, such as source=digits: other images than the run's, or shapes",
        )
        add("--config_file", metavar="FILE.py", help=CONFIG_FILE_HELP)
        add("--step", type=int, help="of the runs' checkpoints; default: the latest")
        add("--best", action="store_true", help="the checkpoint with the best evaluation")
        add("--images", type=arguments.count, metavar="N", help=f"of the test set; {what.images}")
        add("--size", type=int, metavar="PIXELS", help="of the untrained networks' images")
        add("--seed", type=int, default=0, help="of their parameters")
        add("--out", type=path_option, metavar="DIR", help="for the files")
        what.add_arguments(one)
    return parser


def _subjects(options: argparse.Namespace, images: int) -> list[subject.Subject]:
    if not options.model and not options.workdir:
        raise UserError("--model NAME or --workdir DIR is required.")
    settings = {name: _values(text) for name, text in options.set}
    data = values(options.data)
    subjects = []
    for name in options.model:
        subjects += subject.grid(
            name, settings, images=images, seed=options.seed, size=options.size, data=data
        )
    parts = None if options.config_file is None else Parts.of_file(options.config_file)
    which = {"step": options.step, "best": options.best, "data": data, "parts": parts}
    subjects += [subject.from_run(run, images=images, **which) for run in options.workdir]
    return _told_apart(subjects)


def _told_apart(subjects: list[subject.Subject]) -> list[subject.Subject]:
    """Results go by the subjects' names: runs of one name in several folders get numbers."""
    counts = collections.Counter(s.name for s in subjects)
    seen: collections.Counter[str] = collections.Counter()
    named = []
    for one in subjects:
        seen[one.name] += 1
        number = f" ({seen[one.name]})" if counts[one.name] > 1 else ""
        named.append(dataclasses.replace(one, name=f"{one.name}{number}"))
    return named


def _values(text: str) -> list[Any]:
    """'relu,sigmoid' -> ['relu', 'sigmoid']."""
    return [value(v) for v in text.split(",")]


def _folder(options: argparse.Namespace) -> pathlib.Path:
    if len(options.workdir) == 1 and not options.model:
        return pathlib.Path(options.workdir[0]) / "analysis"
    return pathlib.Path("analysis")


if __name__ == "__main__":
    runtime.configure()
    sys.exit(main())
