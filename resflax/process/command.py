"""The flag --config of the command lines, and one line about what a user can get wrong."""

import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from resflax import config as config_lib
from resflax.errors import UserError
from resflax.models import list_models
from resflax.parts import NONE, Parts
from resflax.process import program
from resflax.process.arguments import Parser, fail

__all__ = ["CONFIG", "Parser", "config_name", "fail", "load", "parse", "parts", "read"]


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
    """Reads FILE.py[:DATASET] as `resflax.process.command.read` does.

    Attributes:
      parts: of the user's own, that the file defines.
    """

    def __init__(self, argv: Sequence[str]):
        self.parts = NONE
        self._argv = argv  # with the overrides

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        config, self.parts = read(argument)
        names = [config.model.name] if "model" in config else []
        for word, after in itertools.zip_longest(self._argv, self._argv[1:], fillvalue=""):
            if match := re.fullmatch(r"--?config\.model\.name(?:=(.*))?", word, re.DOTALL):
                names.append(after if match[1] is None else match[1])
        if names and (self.parts.model is None or names[-1] in list_models()):
            try:
                config_lib.list_arguments(config.model, names[-1])
            except UserError as error:
                raise UserError(f"config.model: {error}") from None
        return config

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
    values["config"].parser = _ConfigFile(argv)
    return holder


_ARGV: list[str] = []  # the command line, once it is parsed
CONFIG = _define(flags.FLAGS, _ARGV)


def config_name() -> str:
    """The config file's name, without its ending."""
    return pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem


def parts() -> Parts:
    """The parts of the user's own that the config file defines, once the flags are parsed."""
    own: Parts = flags.FLAGS["config"].parser.parts  # type: ignore[attr-defined]
    return own


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
        fail(error)
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


def read(config: str) -> tuple[ml_collections.ConfigDict, Parts]:
    """What `get_config` of a config file gives, and the parts of the user's own beside it.

    Args:
      config: FILE.py or FILE.py:DATASET.

    Raises:
      UserError: if there is no such file, or it has no `get_config`, or that fails; in one line.
    """
    file, colon, argument = config.partition(":")
    names = program.run(file)
    if "get_config" not in names:
        raise UserError(f"{file} has no get_config().")
    made = program.call(file, names["get_config"], *([argument] if colon else []))
    if not isinstance(made, ml_collections.ConfigDict):
        raise UserError(
            f"{file}: get_config() gives {type(made).__name__}; it must return a config, such as "
            "that of resflax.config.base()."
        )
    made.lock()
    return made, Parts.defined(file, names)


def _parse(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Sets the flags of a command line; raises UserError."""
    try:
        rest = values(argv)
    except flags.Error as error:
        if isinstance(error.__context__, UserError):  # of the config file, wrapped by absl
            raise error.__context__ from None
        raise UserError(program.line(error)) from None
    except (AttributeError, LookupError, ValueError) as error:  # of ml_collections: an override
        raise UserError(_unknown(error, argv)) from None
    config = values["config"].value
    if config is not None:
        for field, value in config_lib.flatten(config).items():
            if value == (None,):  # as ml_collections reads a tuple that is None
                config.update_from_flattened_dict({field: None})
        config_lib.require_whole(config)
        config_lib.drop_unset(config.model)
    return rest


def _unknown(error: Exception, argv: Sequence[str]) -> str:
    """The field that a config has not, and one with a name like it."""
    overrides = [m[1] for word in argv if (m := re.match(r"--?(?:no)?config\.([^=]*)", word))]
    return program.unknown(error) or (
        f"the config cannot be changed by --config.{' or --config.'.join(overrides)}."
    )
