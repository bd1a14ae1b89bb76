"""A sweep on SLURM: one script, an array job with a task for each run.

Written for sbatch itself and not for submitit. A run is a command line that resumes from its
directory, so there is no Python function to pickle and no state to hand over; what is left is a
script that a user of the cluster can read, change and submit by hand, with SLURM's own requeue,
and `srun` for several nodes.
"""

import argparse
import json
import pathlib
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch import lock, resources, status
from resflax.errors import UserError

if TYPE_CHECKING:
    from launch.runs import Run

# Seconds that a run gets to save itself before its time is up.
_SAVE_SECONDS = 120

# Of a task of several, when another one has ended: jax stops it within a minute, SLURM after this.
_WAIT_SECONDS = 120

# What sbatch says, after two minutes of its own trying, of a queue that has no room for the array.
_FULL = "Resource temporarily unavailable"

# In a sweep's directory: the scripts and logs of its jobs, and which task each run is.
_FOLDER = "slurm"

_BODY = pathlib.Path(__file__).with_name("slurm.sh")


class SlurmError(UserError):
    """SLURM, or this machine, does not take the sweep; the message says why."""


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """The options of this executor."""
    resources.add_arguments(parser)
    parser.add_argument(
        "--parallel", type=resources.positive, metavar="N", help="runs at once; default: no limit"
    )
    parser.add_argument("--time", help="of each run until it is requeued, such as 4:00:00")
    parser.add_argument("--partition", help="of the cluster")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="another option of sbatch, such as --sbatch=--account=vision; repeatable",
    )


def submit(runs: Sequence["Run"], options: argparse.Namespace) -> int:
    """Submits the runs that are neither finished nor in SLURM's queue.

    Args:
      runs: of one sweep; their directories lie side by side, where all nodes see them.
      options: see add_arguments.

    Returns:
      0: SLURM has what is left of the sweep.

    Raises:
      SlurmError: if it does not take them. Nothing is lost: the same command tries again.
      LockError: if another sweep is at work in their directory.
    """
    for program in ("squeue", "sbatch"):
        _require(program)
    workdir = runs[0].workdir.parent
    with lock.held(workdir):
        waiting = queued(workdir)
        left = []
        for run in runs:
            if status.result(run.workdir) is not None:
                print(f"{run.name}: done")
            elif run.name in waiting:
                print(f"{run.name}: {waiting[run.name].lower()}")
            else:
                left.append(run)
        if left:
            folder = workdir / _FOLDER
            job = _sbatch(left, options, folder)
            print(
                f"job {job}: {len(left)} of {len(runs)} runs, by {folder / job}.sh\n"
                f"squeue --job {job} shows them, scancel {job} stops them, and the same command "
                "submits what is left then."
            )
    return 0


def queued(workdir: pathlib.Path) -> dict[str, str]:
    """The runs of a sweep's directory that are in SLURM's queue, and their states: see squeue.

    None are, where there is no SLURM: directories are copied from clusters.

    Raises:
      SlurmError: if SLURM does not tell.
    """
    tasks = _tasks(workdir / _FOLDER)
    if not tasks or shutil.which("squeue") is None:
        return {}
    lines = _ask("squeue", "--me", "--noheader", "--array", "--format=%i %T").splitlines()
    states = dict(line.split() for line in lines)
    return {name: states[task] for name, task in tasks if task in states}


def script(runs: Sequence["Run"], options: argparse.Namespace) -> str:
    """The array job of the runs, as a script for sbatch.

    Args:
      runs: a task each.
      options: see submit.

    Raises:
      SlurmError: if a path or an option has a character that would end its line in the script.
    """
    folder = runs[0].workdir.parent
    wanted = resources.of(options)
    directives = _directives(runs, options, wanted)
    for text in (str(folder), *directives):
        if not text.isprintable():  # what follows a newline would be run
            raise SlurmError(f"{text!r} must be printable characters in one line.")
    return "\n".join(
        [
            "#!/bin/bash",
            f"# The runs in {folder}, a task of an array job each. SLURM has a copy of its own.",
            *(f"#SBATCH {line}" for line in directives),
            "",
            'case "$SLURM_ARRAY_TASK_ID" in',
            *(_case(number, run, wanted) for number, run in enumerate(runs)),
            "esac",
            f"srun=({' '.join(_srun(wanted))})",
            _BODY.read_text(),
        ]
    )


def _directives(
    runs: Sequence["Run"], options: argparse.Namespace, wanted: resources.Resources
) -> list[str]:
    folder = runs[0].workdir.parent
    values = {
        "job-name": folder.name,
        "array": f"0-{len(runs) - 1}" + (f"%{options.parallel}" if options.parallel else ""),
        "chdir": pathlib.Path.cwd(),
        "output": str(folder / _FOLDER).replace("%", "%%") + "/%A_%a.log",
        "open-mode": "append",
        "signal": f"TERM@{_SAVE_SECONDS}",
        "time": options.time,
        "partition": options.partition,
        "nodes": wanted.nodes,
        "ntasks-per-node": _tasks_per_node(wanted),
        "cpus-per-task": _cpus_per_task(wanted),
        "gres": wanted.gpus and f"gpu:{wanted.gpus}",
        "mem": wanted.memory and f"{wanted.memory}G",
    }
    lines = [f"--{name}={shlex.quote(str(value))}" for name, value in values.items() if value]
    return [*lines, "--requeue", *options.sbatch]


def _case(number: int, run: "Run", wanted: resources.Resources) -> str:
    command = list(run.command)
    if _is_distributed(wanted):
        command += ["--processes", "auto"]
    if wanted.gpus:  # to train on some of them, or on none, is worse than to stop
        command += ["--expect_devices", str(wanted.nodes * wanted.gpus)]
    return (
        f"  {number})\n"
        f"    workdir={shlex.quote(str(run.workdir))}\n"
        f"    command=({shlex.join(command)})\n"
        "    ;;"
    )


def _srun(wanted: resources.Resources) -> list[str]:
    # srun does not take the number of cores from the job.
    cpus = [f"--cpus-per-task={_cpus_per_task(wanted)}"] if wanted.cpus else []
    return [*cpus, f"--wait={_WAIT_SECONDS}"] if _is_distributed(wanted) else cpus


def _is_distributed(wanted: resources.Resources) -> bool:
    """Whether a run has several processes."""
    return wanted.nodes > 1


def _tasks_per_node(wanted: resources.Resources) -> int:
    # A process alone takes all GPUs of its node. One of several gets a single GPU from jax on
    # SLURM, that of its number on the node; it must see them all, hence --gres.
    return max(1, wanted.gpus) if _is_distributed(wanted) else 1


def _cpus_per_task(wanted: resources.Resources) -> int | None:
    return wanted.cpus and max(1, wanted.cpus // _tasks_per_node(wanted))


def _sbatch(runs: Sequence["Run"], options: argparse.Namespace, folder: pathlib.Path) -> str:
    """Submits the runs and notes which task each of them is; returns the job's number."""
    draft = folder / "next.sh"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft.write_text(script(runs, options))
    except OSError as error:
        raise SlurmError(f"{draft} cannot be written: {error.strerror}.") from None
    # --parsable: the number alone, or NUMBER;CLUSTER.
    job = _ask("sbatch", "--parsable", str(draft)).strip().partition(";")[0]
    draft.rename(folder / f"{job}.sh")
    (folder / f"{job}.json").write_text(json.dumps([run.name for run in runs], indent=2) + "\n")
    return job


def _tasks(folder: pathlib.Path) -> list[tuple[str, str]]:
    """The runs that were submitted before, and their tasks, such as '12_3'."""
    return [
        (name, f"{file.stem}_{i}")
        for file in folder.glob("*.json")
        for i, name in enumerate(json.loads(file.read_text()))
    ]


def _ask(program: str, *arguments: str) -> str:
    """What a program of SLURM's prints.

    Raises:
      SlurmError: with the last thing that it said, if it fails or is not there.
    """
    _require(program)
    process = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        said = lines[-1].removeprefix(f"{program}: error: ")
        if _FULL in said:
            said += " (the queue is full)"
        raise SlurmError(f"{program}: {said.rstrip('.')}; nothing was submitted.")
    return process.stdout


def _require(program: str) -> None:
    if shutil.which(program) is None:
        raise SlurmError(
            f"there is no {program} on this machine; "
            "give the command on a node that jobs are submitted from."
        )
