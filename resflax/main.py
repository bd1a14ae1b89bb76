"""Trains a network: python -m resflax.main --config configs/se_resnext.py [--workdir DIR].

The same command with the same --workdir resumes. Bad input ends with one line and exit code 2.
"""

import datetime
import pathlib
import sys

from absl import app, flags, logging

from resflax import command, runtime

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's directory; default: runs/CONFIG-DATASET/TIME."
)


def main(argv: list[str]) -> None:
    """Runs the experiment of the flags."""
    if len(argv) > 1:
        command.fail(
            f"unexpected argument {argv[1]!r}; there are --config FILE.py and --workdir DIR."
        )
    # Orbax tells the course of every save; a user wants the network's.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    # Imported now: what is wrong with the flags has been said before the libraries load.
    from resflax.progress import NonFiniteError
    from resflax.train import train_and_evaluate

    programs = runtime.count_programs()
    workdir = pathlib.Path(_WORKDIR.value or _default_workdir()).expanduser().resolve()
    try:
        train_and_evaluate(command.CONFIG.value, workdir)
    except (ValueError, NonFiniteError) as error:
        command.fail(str(error))
    except KeyboardInterrupt:
        print(f"stopped; the same command with --workdir {workdir} goes on.", file=sys.stderr)
        sys.exit(130)
    if programs.compiled or programs.cached:
        print(f"programs: {programs.compiled} compiled, {programs.cached} read from the cache")


def _default_workdir() -> str:
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"runs/{command.config_name()}-{command.CONFIG.value.data.source}/{now}"


if __name__ == "__main__":
    runtime.configure()
    app.run(main, flags_parser=command.parse)
