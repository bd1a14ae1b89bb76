"""A config file is a program: what it defines, and what is said where it fails."""

import os
import re
import runpy
import sys
import traceback
from typing import Any

from resflax.errors import UserError


def run(file: str) -> dict[str, Any]:
    """Runs a config file, and gives the names that it defines.

    It can import the files beside it, also later on, by names that no library has.

    Raises:
      UserError: if there is no such file, or it fails: see `call`.
    """
    if not os.path.isfile(file):
        raise UserError(f"--config: there is no file {file}.")
    if (folder := _folder(file)) not in sys.path:
        sys.path.append(folder)
    return call(file, runpy.run_path, file, run_name="config")


def call(file: str, function: Any, *arguments: Any, **named: Any) -> Any:
    """The result of a function of a config file.

    Raises:
      UserError: if it fails: with its own message, if it says what is wrong, or the line of the
        file where it does. Where that line was called by others of the file, or of those beside
        it, these lines are a note of the error.
    """
    try:
        return function(*arguments, **named)
    except Exception as error:  # a config file is a program, and can raise anything
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if _folder(frame.filename) == _folder(file)]
        told = UserError(_explain(error, file, own, raised_there=own[-1:] == frames[-1:]))
        if len(own) > 1:
            told.add_note("".join(traceback.format_list(own)).rstrip())
        raise told from error


def unknown(error: Exception) -> str:
    """The field that a config has not, and one with a name like it, of an error of ml_collections.

    Returns:
      A sentence; '' where the error is another one.
    """
    text = str(error)
    if close := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text):
        return f"the config has no field {close[2]!r}; did you mean {close[1]}?"
    if missing := re.search(r"""^['"]*(?:Key )?['"](\w+)['"]""", text):
        return f"the config has no field {missing[1]!r}."
    return ""


def line(error: BaseException) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split())


def _explain(
    error: Exception, file: str, own: list[traceback.FrameSummary], *, raised_there: bool
) -> str:
    if isinstance(error, UserError):
        return line(error)
    if isinstance(error, ValueError) and raised_there and not isinstance(error, UnicodeError):
        return line(error)
    where = f"{own[-1].filename}:{own[-1].lineno}" if own else file
    if isinstance(error, AttributeError | KeyError) and "Did you mean" in str(error):
        return f"{where}: {unknown(error)}"
    return f"{where}: {type(error).__name__}: {line(error)}"


def _folder(file: str) -> str:
    return os.path.dirname(os.path.abspath(file))
