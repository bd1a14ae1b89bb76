"""The flag --config of the command lines, and one line about what a user can get wrong."""

import os
import pathlib
import re
import runpy
import traceback
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from resflax.errors import UserError
from resflax.process.arguments import Parser, fail

__all__ = ["CONFIG", "Parser", "call", "config_name", "fail", "load", "parse", "program", "read"]


class _OrNone(flags.ArgumentParser):
    """Reads a field's value, or None, which is the default of many."""

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser
        self.syntactic_help = parser.syntactic_help

    def parse(self, argument: Any) -> Any:
        return None if argument == "None" else self._parser.parse(argument)

    def flag_type(self) -> str:
        return self._parser.flag_type()


for _type, _parser in (
    (bool, flags.BooleanParser()),
    (int, flags.IntegerParser()),
    (float, flags.FloatParser()),
    (str, flags.ArgumentParser()),
):
    config_flags.register_flag_parser_for_type(_type, _OrNone(_parser))


class _ConfigFile(flags.ArgumentParser):
    """Reads FILE.py[:DATASET] as `resflax.process.command.read` does."""

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        return read(argument)

    def flag_type(self) -> str:
        return "config object"


def _define(values: flags.FlagValues, argv: list[str]) -> flags.FlagHolder:
    """Defines --config, whose overrides are looked for in `argv` when it is parsed."""
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "The experiment: FILE.py or FILE.py:DATASET.",
        flag_values=values,
        sys_argv=argv,
    )
    # Of ml_collections, the overrides are used. Its own way to load a file keeps the names of the
    # one before, and hides what went wrong.
    values["config"].parser = _ConfigFile()
    return holder


_ARGV: list[str] = []  # the command line, once it is parsed
CONFIG = _define(flags.FLAGS, _ARGV)


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
    _ARGV[:] = argv
    try:
        rest = _parse(flags.FLAGS, argv)
    except UserError as error:
        fail(str(error))
    if CONFIG.value is None:
        fail("--config FILE.py is required, such as --config configs/se_resnext.py.")
    return rest


def load(config: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The config as a command line with these flags has it; the process's own flags are left alone.

    Args:
      config: FILE.py or FILE.py:DATASET.
      overrides: such as '--config.model.depth=50'.

    Raises:
      UserError: if there is no such config, or no such field; in one line.
    """
    values = flags.FlagValues()
    argv: list[str] = []
    _define(values, argv)
    argv += ["", f"--config={config}", *overrides]
    _parse(values, argv)
    return values["config"].value


def read(config: str) -> ml_collections.ConfigDict:
    """What `get_config` of a config file gives, locked.

    Args:
      config: FILE.py or FILE.py:DATASET.

    Raises:
      UserError: if there is no such file, or it has no `get_config`, or that fails; in one line.
    """
    file, colon, argument = config.partition(":")
    names = program(file)
    if "get_config" not in names:
        raise UserError(f"{file} has no get_config().")
    made = call(file, names["get_config"], *([argument] if colon else []))
    if not isinstance(made, ml_collections.ConfigDict):
        raise UserError(
            f"{file}: get_config() gives {type(made).__name__}; it must return a config, such as "
            "that of resflax.config.base()."
        )
    made.lock()
    return made


def program(file: str) -> dict[str, Any]:
    """Runs a config file, and gives the names that it defines.

    Raises:
      UserError: if there is no such file, or it fails; in one line.
    """
    if not os.path.isfile(file):
        raise UserError(f"--config: there is no file {file}.")
    return call(file, runpy.run_path, file, run_name="config")


def call(file: str, function: Any, *arguments: Any, **named: Any) -> Any:
    """The result of a function of a config file.

    Raises:
      UserError: if it fails: with its own message, if it says what is wrong, or the line of the
        file where it does.
    """
    try:
        return function(*arguments, **named)
    except Exception as error:  # a config file is a program, and can raise anything
        raise UserError(_explain(error, file)) from error


def _parse(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Sets the flags of a command line; raises UserError."""
    try:
        rest = values(argv)
    except flags.Error as error:
        # Absl wraps what its parsers raise.
        told = error.__context__ if isinstance(error.__context__, UserError) else error
        raise UserError(_line(told)) from None
    except (AttributeError, LookupError, ValueError) as error:  # of ml_collections: an override
        raise UserError(_unknown(error, argv)) from None
    config = values["config"].value
    if config is not None:
        from resflax import config as config_lib  # only now: it takes seconds, unless a file did

        for field, value in config_lib.flatten(config).items():
            if value == (None,):  # as ml_collections reads a tuple that is None
                config.update_from_flattened_dict({field: None})
        config_lib.require_whole(config)
    return rest


def _unknown(error: Exception, argv: Sequence[str] = ()) -> str:
    """The field that a config has not, and one with a name like it."""
    text = str(error)
    if close := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text):
        return f"the config has no field {close[2]!r}; did you mean {close[1]}?"
    if missing := re.search(r"""^['"]*(?:Key )?['"](\w+)['"]""", text):
        return f"the config has no field {missing[1]!r}."
    overrides = [m[1] for word in argv if (m := re.match(r"--?(?:no)?config\.([^=]*)", word))]
    return f"the config cannot be changed by --config.{' or --config.'.join(overrides)}."


def _explain(error: Exception, file: str) -> str:
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        return _line(error)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    where = f"{file}:{lines[-1]}" if lines else file
    if isinstance(error, AttributeError | KeyError) and "Did you mean" in str(error):
        return f"{where}: {_unknown(error)}"
    return f"{where}: {type(error).__name__}: {_line(error)}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
