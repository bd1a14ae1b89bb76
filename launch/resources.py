"""What each run asks of a cluster: --nodes, --gpus, --cpus, --memory."""

import argparse
import dataclasses


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of one run.

    Attributes:
      nodes: machines, of one kind.
      gpus: of each node.
      cpus: cores of each node; None: what the cluster gives.
      memory: of each node, in GiB; None: what the cluster gives.
    """

    nodes: int = 1
    gpus: int = 0
    cpus: int | None = None
    memory: int | None = None


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """The options that `of` reads."""
    parser.add_argument("--nodes", type=positive, default=1, help="machines; default: 1")
    parser.add_argument("--gpus", type=positive, default=0, help="of each node; default: none")
    parser.add_argument("--cpus", type=positive, help="cores of each node")
    parser.add_argument("--memory", type=positive, metavar="GIB", help="of each node, in GiB")


def of(arguments: argparse.Namespace) -> Resources:
    """What the options say."""
    return Resources(arguments.nodes, arguments.gpus, arguments.cpus, arguments.memory)


def positive(text: str) -> int:
    """An option's value that is a number above zero.

    Raises:
      argparse.ArgumentTypeError: if it is not.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero.")
    return int(text)
