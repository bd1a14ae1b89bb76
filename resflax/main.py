"""Trains a network: python -m resflax.main --config configs/se_resnext.py [--workdir DIR].

The same command with the same --workdir resumes. Exit code 2: bad input, or numbers that are not
finite, with one line that says so; 130, 143 and 129: stopped by Ctrl-C, SIGTERM or SIGHUP (a closed
terminal), with its state saved; a second signal does not wait for that.
One run may have several processes: see resflax.process.distributed.
"""

import datetime
import os
import pathlib
import sys

import jax
from absl import app, flags, logging

from resflax.errors import UserError
from resflax.process import arguments, command, distributed, runtime

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's directory; default: runs/CONFIG-DATASET/TIME."
)
_PROCESSES = flags.DEFINE_enum(
    "processes",
    None,
    distributed.MODES,
    "Whether the run has several processes: auto: as SLURM, Kubernetes, Open MPI or a Cloud TPU "
    "started them; manual: as the next three flags say. Default: manual where they are given, off.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This one's number, from 0.")
_START_SECONDS = flags.DEFINE_integer(
    "start_seconds", 300, "To wait for the other processes.", lower_bound=1
)
_REPLAY = flags.DEFINE_bool(
    "replay", False, "Repeat the step at which the run of --workdir failed: see failure.json."
)
_EXPECT_DEVICES = flags.DEFINE_integer(
    "expect_devices", None, "Devices of all processes; refuse to start with others.", lower_bound=1
)


def main(argv: list[str]) -> None:
    """Runs the experiment of the flags."""
    runtime.keep_going_unheard()
    if len(argv) > 1:
        command.fail(
            f"unexpected argument {argv[1]!r}; there are --config FILE.py and --workdir DIR."
        )
    # Orbax tells the course of every save, and of one that fails the tracebacks of all its threads;
    # what a user should know of it is said here.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)
    if _REPLAY.value and _WORKDIR.value is None:
        command.fail("--replay needs --workdir: of the run that failed.")
    if command.CONFIG.value.deterministic:
        runtime.make_deterministic()
    try:
        _start_processes()
    except distributed.ProcessError as error:
        command.fail(str(error))
    # Imported now: what is wrong with the flags has been said before the libraries load.
    from resflax.run.interruption import Stopped
    from resflax.run.replay import replay
    from resflax.train import train_and_evaluate

    programs = runtime.count_programs()
    try:
        workdir = pathlib.Path(
            os.path.realpath(arguments.path(_WORKDIR.value or _default_workdir()))
        )
    except UserError as error:
        command.fail(f"--workdir {error}")
    try:
        with distributed.together():
            run = replay if _REPLAY.value else train_and_evaluate
            run(command.CONFIG.value, workdir, command.parts())
    except UserError as error:
        command.fail(error)
    except OSError as error:
        if error.errno is None:
            raise
        # The file system refuses, for example because the disk is full.
        command.fail(f"{error.filename or workdir}: {error.strerror}.")
    except (Stopped, KeyboardInterrupt) as stop:
        print(f"stopped; the same command with --workdir {workdir} goes on.", file=sys.stderr)
        sys.exit(stop.exit_code if isinstance(stop, Stopped) else 130)
    if jax.process_index() == 0 and (programs.compiled or programs.cached):
        print(f"programs: {programs.compiled} compiled, {programs.cached} read from the cache")


def _start_processes() -> None:
    """Makes this process one of several, if the flags say so, and looks for the devices."""
    place = [flag.name for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID) if flag.present]
    mode = _PROCESSES.value or ("manual" if place else "off")
    if mode != "manual" and place:
        raise distributed.ProcessError(f"--processes {mode} excludes --{place[0]}.")
    if mode == "off":
        if _EXPECT_DEVICES.value is not None:
            distributed.require_devices(_EXPECT_DEVICES.value)
        return
    if _WORKDIR.value is None:
        raise distributed.ProcessError(
            "several processes need --workdir: a directory that all of them see."
        )
    distributed.start(_place() if mode == "manual" else None, _START_SECONDS.value)
    distributed.require_devices(_EXPECT_DEVICES.value)
    topology = distributed.topology()
    if jax.process_index() == 0:
        print(topology)


def _place() -> distributed.Place:
    coordinator, count, number = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    if coordinator is None or count is None or number is None:
        raise distributed.ProcessError(
            "--processes manual needs --coordinator, --num_processes and --process_id."
        )
    return distributed.Place(coordinator, count, number)


def _default_workdir() -> str:
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"runs/{command.config_name()}-{command.CONFIG.value.data.source}/{now}"


if __name__ == "__main__":
    runtime.configure()
    app.run(main, flags_parser=command.parse)
