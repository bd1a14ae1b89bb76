"""Prints the commands of the runs that are left to do, one a line, for other means to run them."""

import argparse
import shlex
from collections.abc import Sequence

from launch import status
from launch.runs import Run
from launch.status import State


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Has no options of its own."""


def submit(runs: Sequence[Run], options: argparse.Namespace) -> int:
    """Prints them; returns 0."""
    for run in runs:
        if status.read(run).state is not State.DONE:
            print(shlex.join(run.command))
    return 0
