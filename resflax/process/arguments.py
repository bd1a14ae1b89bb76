"""Command lines: one line about what is wrong with them, and exit code 2."""

import argparse
import ast
import os
import pathlib
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from resflax.errors import UserError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2."""
        fail(message)


def path(name: str | pathlib.Path) -> pathlib.Path:
    """The path that a person names, with ~ as their home; there may be nothing yet.

    Raises:
      UserError: if it begins with the ~ of nobody, or no file system can have it.
    """
    try:
        expanded = pathlib.Path(name).expanduser()
        if max(len(os.fsencode(part)) for part in (*expanded.parts, "")) > 255:
            raise UserError(f"{str(name)[:50]}... has a name of more than 255 bytes in it.")
    except RuntimeError:
        raise UserError(f"{str(name)[:50]!r} is in no known home directory.") from None
    return expanded


def path_option(text: str) -> pathlib.Path:
    """The `type` of an option that takes a path: a shell leaves the ~ of --option=~/x as it is.

    Raises:
      argparse.ArgumentTypeError: if there can be no such path.
    """
    try:
        return path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def assignment(text: str) -> tuple[str, str]:
    """The `type` of an option NAME=VALUE: the name and the text of the value.

    Raises:
      argparse.ArgumentTypeError: if the text is not of this form.
    """
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE.")
    return name, value


def value(text: str) -> Any:
    """'16' -> 16, but 'A' -> 'A'."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # as it documents
        return text


def values(assignments: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """[('folder.path', 'x'), ('image_size', '16')] -> {'folder.path': 'x', 'image_size': 16}."""
    return {name: value(text) for name, text in assignments}


def tell(message: str | UserError) -> None:
    """Says in one line what is wrong, behind the error's notes."""
    for note in getattr(message, "__notes__", ()):
        print(note, file=sys.stderr)
    print("error: " + " ".join(str(message).split()), file=sys.stderr)


def fail(message: str | UserError) -> NoReturn:
    """Says in one line what is wrong, and ends with exit code 2."""
    tell(message)
    sys.exit(2)
