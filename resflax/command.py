"""The flag --config of the command lines, and one line about what a user can get wrong."""

import argparse
import ast
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import ml_collections
from absl import flags
from ml_collections import config_flags

from resflax.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: FILE.py or FILE.py:DATASET.", lock_config=True
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2."""
        fail(message)


def path(text: str) -> pathlib.Path:
    """A path on a command line: a shell leaves the ~ of --option=~/x as it is.

    Raises:
      argparse.ArgumentTypeError: if it begins with the ~ of nobody.
    """
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is in no known home directory.") from None


def assignment(text: str) -> tuple[str, str]:
    """'NAME=VALUE' in two.

    Raises:
      UserError: if it is no such text.
    """
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise UserError(f"{text!r} must be NAME=VALUE.")
    return name, value


def value(text: str) -> Any:
    """'16' -> 16, but 'A' -> 'A'."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def values(texts: Sequence[str]) -> dict[str, Any]:
    """['folder.path=x', 'image_size=16'] -> {'folder.path': 'x', 'image_size': 16}."""
    return {name: value(text) for name, text in map(assignment, texts)}


def config_name() -> str:
    """The config file's name, without its ending."""
    return pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem


def parse(argv: list[str]) -> list[str]:
    """Absl's parser, with one line in place of a traceback for what a user can get wrong.

    Args:
      argv: the program and its arguments.

    Returns:
      The program and what is no flag.
    """
    try:
        rest = flags.FLAGS(argv)
        config_file = _config_file(argv)
    except Exception as error:  # a config file is a program, and can raise anything
        fail(_explain(error, _config_file(argv)))
    if not config_file.is_file():
        fail(f"--config: there is no file {config_file}.")
    return rest


def load(config: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The config as a command line with these flags has it; the process's own flags are left alone.

    Args:
      config: FILE.py or FILE.py:DATASET.
      overrides: such as '--config.model.depth=50'.

    Raises:
      UserError: if there is no such config, or no such field; in one line.
    """
    argv = ["", f"--config={config}", *overrides]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of how ml_collections imports
            values(argv)
    except Exception as error:  # a config file is a program, and can raise anything
        raise UserError(_explain(error, _config_file(argv))) from None
    return values["config"].value


def _config_file(argv: list[str]) -> pathlib.Path:
    """The file named by --config, whether or not absl could load it."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False, add_help=False)
    parser.add_argument("-config", "--config", nargs="?")
    value = parser.parse_known_args(argv[1:])[0].config
    if not value:
        fail("--config FILE.py is required, such as --config configs/se_resnext.py.")
    return pathlib.Path(value.split(":")[0])


def _explain(error: Exception, config_file: pathlib.Path) -> str:
    if not config_file.is_file():
        return f"--config: there is no file {config_file}."
    text = str(error)
    if isinstance(error, flags.Error) and "Traceback" not in text:
        return text
    # What went wrong first: config_flags wraps it, in what it raises and in what it prints.
    cause: BaseException = error
    while cause.__context__ is not None:
        cause = cause.__context__
    if isinstance(error, AttributeError | KeyError) and isinstance(cause, KeyError):
        close = re.search(r'Did you mean "(\w+)"', text)
        return f"the config has no field {cause}" + (
            f"; did you mean {close[1]}?" if close else "."
        )
    if isinstance(cause, ValueError):
        return str(cause)
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(cause.__traceback__)
        if pathlib.Path(frame.filename).name == config_file.name
    ]
    where = f"{config_file}:{lines[-1]}" if lines else str(config_file)
    return f"{where}: {type(cause).__name__}: {cause}"


def fail(message: str) -> NoReturn:
    """Says in one line what is wrong; ends with exit code 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
