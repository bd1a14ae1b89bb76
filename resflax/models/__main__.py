"""Prints the table of the networks, or of one network's parts: python -m resflax.models --help."""

import csv
import difflib
import math
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

import flax.linen as nn

from resflax.models import Count, Published, axes, count, create_model, list_models, published
from resflax.models.constructors import title
from resflax.models.resnet import ResNet
from resflax.models.zoo import VARIANTS, image_size, override_names
from resflax.process.arguments import Parser

# What other commands leave: the differences from other people's networks.
RESULTS, PARITY = pathlib.Path("results"), "parity*.csv"

HEADINGS = ("network", "image", "parameters", "10^9 MACs", "top-1, %", "top-5, %")
FOOTNOTE = """
top-1, top-5: errors as published of the network without overrides; resflax/models/published.csv has
their sources."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what the command line asks for; returns the exit code."""
    parser = Parser(prog="python -m resflax.models", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("pattern", nargs="?", default="*", help="a name, or such as '*resnext*'")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--table", action="store_true", help="every module of the one that matches")
    form.add_argument(
        "--arguments", action="store_true", help="what the one that matches can be told otherwise"
    )
    form.add_argument("--markdown", action="store_true", help="the list as Markdown")
    parser.add_argument("--batch", type=int, metavar="N", help="images in the step of --table; 1")
    args = parser.parse_args(argv)

    names = list_models(args.pattern)
    if not names:
        parser.error(f"no network matches {args.pattern!r}; {_closest(args.pattern)}.")
    if (args.table or args.arguments) and len(names) > 1:
        flag, some = "--table" if args.table else "--arguments", ", ".join(names[:3])
        parser.error(f"{flag} takes one network; {args.pattern!r} matches {len(names)}: {some} ...")
    if args.batch is not None and (not args.table or args.batch < 1):
        parser.error("--batch takes the number of images in a step, 1 or more, with --table.")

    if args.table:
        lines = _table(names[0], args.batch or 1)
    elif args.arguments:
        lines = _arguments(names[0])
    else:
        lines = _markdown(names) if args.markdown else _list(names)
    try:
        for line in lines:  # one by one: counting them all takes a while
            print(line, flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _closest(pattern: str) -> str:
    name = pattern.strip("*")
    close = difflib.get_close_matches(name, list_models(), n=5, cutoff=0.5)
    close = list_models(f"*{name}*")[:5] or close
    return f"the closest are {', '.join(close)}" if close else "without a pattern all are listed"


def _list(names: list[str]) -> Iterator[str]:
    widths = (max(map(len, (*names, HEADINGS[0]))), 5, 11, 9, 8, 8)
    yield from _head(HEADINGS, widths)
    for name in names:
        yield _line(_row(name), widths)
    yield FOOTNOTE


def _markdown(names: list[str]) -> Iterator[str]:
    files = sorted(RESULTS.glob(PARITY))
    parity = read_parity(files)
    headings = (*HEADINGS, "parity") if files else HEADINGS
    yield f"| {' | '.join(headings)} |"
    yield f"|---|{'---:|' * (len(headings) - 1)}"
    for name in names:
        _, *cells = _row(name)
        if files:
            cells.append(parity.get(name, ""))
        yield f"| {' | '.join((f'`{name}`', *cells))} |"


def _row(name: str) -> tuple[str, ...]:
    """The cells of a network in the list."""
    side = image_size(name)
    cost = count(create_model(name), (side, side, 3))
    row = as_published(name)
    errors = (row.top1, row.top5) if row else ("", "")
    return name, str(side), f"{cost.params:,}", f"{cost.macs / 1e9:.4f}", *errors


def as_published(name: str) -> Published | None:
    """The row with the errors of a network as its name makes it.

    That is the row without overrides; if there is none, one whose overrides change nothing.
    """
    model = create_model(name)
    rows = (row for row in published(name) if row.top1 or row.top5)
    for row in sorted(rows, key=lambda row: bool(row.overrides)):
        if create_model(name, row.num_classes, **row.overrides) == model:
            return row
    return None


def read_parity(paths: Iterable[pathlib.Path]) -> dict[str, str]:
    """The largest difference of each network from a peer, and whose that is: '2e-06 (timm)'.

    Args:
      paths: CSV files with the columns model, library and difference, and any others. Rows without
        a name or a number are left out.
    """
    worst: dict[str, tuple[float, str]] = {}
    for path in paths:
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            model = row.get("model")
            try:
                difference = float(row["difference"])
            except (KeyError, TypeError, ValueError):
                continue
            if not model:
                continue
            difference = math.inf if math.isnan(difference) else difference
            found = difference, f" ({row['library']})" if row.get("library") else ""
            worst[model] = max(worst.get(model, (-math.inf, "")), found)
    return {model: f"{difference:.0e}{peer}" for model, (difference, peer) in worst.items()}


def _table(name: str, batch_size: int) -> Iterator[str]:
    """Every module of a network, what it costs for one image, and the memory of a batch."""
    model, side = create_model(name), image_size(name)
    cost = count(model, (side, side, 3), batch_size)
    assert cost.activation_memory is not None
    headings = ("module", "output", "parameters", "MACs", "activations")
    rows = [*_modules(cost), _cells("total", cost)]
    widths = tuple(max(map(len, column)) for column in zip(headings, *rows, strict=True))
    yield f"{name}, an image of {side} x {side} x 3\n"
    yield from _head(headings, widths)
    for row in rows[:-1]:
        yield _line(row, widths)
    yield _rule(widths)
    yield _line(rows[-1], widths)
    images = f"{batch_size} image" + ("s" if batch_size > 1 else "")
    yield f"\nactivation memory of a training step on {images}: {_size(cost.activation_memory)}"


def _arguments(name: str) -> Iterator[str]:
    """The arguments of `create_model` for a network, their values, and what else they can be."""
    model = create_model(name)
    yield f"resflax.create_model({name!r}, ...)\n"
    for argument in override_names(name):
        value = getattr(model, argument, VARIANTS[name].keywords.get(argument))
        said = "" if value is None else title(value)
        others = [f"{other!r}" for other in _choices(model, argument) if other != value]
        if isinstance(model, ResNet) and argument in axes.TABLES:
            kind = {"act": "a function", "kernel_init": "a flax initialiser"}
            others.append(kind.get(argument, "a constructor"))
        yield f"{argument:<18}{said:<14}{'or ' * bool(others)}{', '.join(others)}".rstrip()


def _choices(model: nn.Module, argument: str) -> Iterable[str]:
    """The names that an argument of a ResNet can have."""
    return (axes.TABLES | axes.CHOICES).get(argument, ()) if isinstance(model, ResNet) else ()


def _modules(cost: Count, depth: int = 0) -> Iterator[tuple[str, ...]]:
    for name, part in cost.parts.items():
        yield _cells("  " * depth + name, part)
        yield from _modules(part, depth + 1)


def _cells(name: str, cost: Count) -> tuple[str, ...]:
    shape = " x ".join(map(str, cost.output_shape))
    numbers = (cost.params, cost.macs, cost.activations)
    return name, shape, *(f"{number:,}" if number else "" for number in numbers)


def _size(num_bytes: int) -> str:
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{num_bytes / unit:.2f} {name} ({num_bytes:,} bytes)"


def _head(headings: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    yield _line(headings, widths)
    yield _rule(widths)


def _rule(widths: Sequence[int]) -> str:
    return "-" * (sum(widths) + 2 * (len(widths) - 1))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The cells in columns, the first to the left and the others to the right."""
    first, *others = (
        cell.rjust(width) if i else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join((first, *others)).rstrip()


if __name__ == "__main__":
    sys.exit(main())
