"""Trains a network: python -m resflax.main --config configs/se_resnext.py [--workdir DIR].

The same command with the same --workdir resumes. Bad input ends with one line and exit code 2.
"""

import argparse
import datetime
import pathlib
import re
import sys
import traceback
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from resflax import runtime

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: FILE.py or FILE.py:DATASET.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's directory; default: runs/CONFIG-DATASET/TIME."
)


def main(argv: list[str]) -> None:
    """Runs the experiment of the flags."""
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}; there are --config FILE.py and --workdir DIR.")
    # Orbax tells the course of every save; a user wants the network's.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    # Imported now: what is wrong with the flags has been said before the libraries load.
    from resflax.progress import NonFiniteError
    from resflax.train import train_and_evaluate

    workdir = pathlib.Path(_WORKDIR.value or _default_workdir()).expanduser().resolve()
    try:
        train_and_evaluate(_CONFIG.value, workdir)
    except (ValueError, NonFiniteError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print(f"stopped; the same command with --workdir {workdir} goes on.", file=sys.stderr)
        sys.exit(130)


def _default_workdir() -> str:
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"runs/{name}-{_CONFIG.value.data.source}/{now}"


def _parse_flags(argv: list[str]) -> list[str]:
    """Absl's parser, with one line in place of a traceback for what a user can get wrong."""
    try:
        rest = flags.FLAGS(argv)
        config_file = _config_file(argv)
    except Exception as error:  # a config file is a program, and can raise anything
        _fail(_explain(error, _config_file(argv)))
    if not config_file.is_file():
        _fail(f"--config: there is no file {config_file}.")
    return rest


def _config_file(argv: list[str]) -> pathlib.Path:
    """The file named by --config, whether or not absl could load it."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False, add_help=False)
    parser.add_argument("-config", "--config", nargs="?")
    value = parser.parse_known_args(argv[1:])[0].config
    if not value:
        _fail("--config FILE.py is required, such as --config configs/se_resnext.py.")
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


def _fail(message: str) -> NoReturn:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    runtime.configure()
    app.run(main, flags_parser=_parse_flags)
