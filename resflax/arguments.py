"""Command lines: one line about what is wrong with them, and exit code 2."""

import argparse
import os
import pathlib
import sys
from typing import NoReturn

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


def fail(message: str) -> NoReturn:
    """Says in one line what is wrong; ends with exit code 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
