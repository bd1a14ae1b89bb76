"""Runs on this machine, each in a process of its own: as many at once as there are accelerators."""

import argparse
import collections
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from launch import accelerators, lock, signals, slurm, status, table
from launch.runs import Run
from launch.status import State
from resflax.errors import UserError

# A run that is asked by SIGINT ends after its step, which may have to be compiled first; SIGTERM
# and then SIGKILL end it at once. Its checkpoints are whole in any case.
_STAGES = ((signal.SIGINT, 60.0), (signal.SIGTERM, 20.0))


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """The options of this executor."""
    parser.add_argument(
        "--parallel",
        type=int,
        metavar="N",
        help="runs at once; default: one an accelerator, each on its own, or one on the CPU; "
        "several share its cores out",
    )


def submit(runs: Sequence[Run], options: argparse.Namespace) -> int:
    """Runs all that are not finished; a failed one does not stop the others.

    Args:
      runs: of one sweep.
      options: see add_arguments.

    Returns:
      0 if all are done, 1 if some failed, 130 if SIGINT, SIGTERM or SIGHUP stopped them.

    Raises:
      UserError: if an option cannot be, or the runs are at work elsewhere.
    """
    if options.parallel is not None and options.parallel < 1:
        raise UserError(f"--parallel {options.parallel} must be at least 1.")
    workdir = runs[0].workdir.parent
    if queued := slurm.queued(workdir):
        raise UserError(
            f"--workdir {workdir}: SLURM has {len(queued)} of its runs, such as {min(queued)}; "
            "wait for their end, or scancel them."
        )
    with (
        lock.held(workdir) as held,
        signals.noted() as received,
        table.display(runs) as show,
    ):
        pool = _Pool(runs, accelerators.slots(options.parallel), held)
        while not received and pool.step():
            show(pool.statuses)
            time.sleep(signals.POLL)
        if received:
            print("stopping the runs; a second Ctrl-C hastens it.", file=sys.stderr, flush=True)
            pool.stop(received, lambda: show(pool.statuses))
        show(pool.statuses)
    count = collections.Counter(run.state for run in pool.statuses.values())
    if count[State.DONE] == len(runs):
        return 0
    if not received:
        return 1
    print(
        f"stopped with {count[State.DONE]} of {len(runs)} runs done; the same command goes on.",
        file=sys.stderr,
    )
    return 130


@dataclasses.dataclass
class _Attempt:
    """A start of a run, in one of the slots."""

    run: Run
    process: subprocess.Popen[bytes]
    slot: int  # its number
    log_start: int  # bytes of the log that earlier attempts wrote

    def error(self) -> str:
        """The last error that it printed."""
        with (self.run.workdir / status.LOG).open("rb") as log:
            log.seek(self.log_start)
            output = log.read().decode(errors="replace")
        return status.last_error(output, self.process.returncode)


class _Pool:
    """The runs that wait, those that are alive, and the status of all.

    Attributes:
      statuses: by the runs' names.
    """

    def __init__(self, runs: Sequence[Run], slots: Sequence[accelerators.Slot], held: int):
        """Takes up the runs that are not finished.

        Args:
          runs: of one sweep.
          slots: of the runs that are alive at one time.
          held: descriptor of the sweep's lock, which its runs inherit.
        """
        self.statuses = {run.name: status.read(run) for run in runs}
        self._waiting: collections.deque[Run] = collections.deque()
        self._alive: list[_Attempt] = []
        self._slots = slots
        self._free = list(range(len(slots)))
        self._held = held
        for run in runs:
            # Nothing is started, or written, where another config's run is.
            if self.statuses[run.name].state is not State.DONE and not status.conflict(run):
                self._waiting.append(run)
                self._set(run, state=State.QUEUED, error="")

    def step(self) -> bool:
        """Takes note of what ended, and starts what can be; False if nothing is left."""
        for attempt in list(self._alive):
            if attempt.process.poll() is None:
                epoch, top1 = status.progress(attempt.run.workdir)
                self._set(attempt.run, epoch=epoch, top1=top1)
            else:
                self._ended(attempt)
        while self._waiting and self._free:
            self._start(self._waiting.popleft())
        return bool(self._alive)

    def stop(self, received: Sequence[int], meanwhile: Callable[[], None]) -> None:
        """Ends the runs that are alive; what they have done is kept.

        Args:
          received: signals to this process; another one hastens it.
          meanwhile: called while it waits.
        """
        signals.end([a.process for a in self._alive], _STAGES, received, meanwhile)
        for attempt in self._alive:
            self.statuses[attempt.run.name] = status.read(attempt.run)
        self._alive.clear()

    def _start(self, run: Run) -> None:
        number = self._free[0]
        slot = self._slots[number]
        try:
            run.workdir.mkdir(exist_ok=True)
            (run.workdir / status.ERROR).unlink(missing_ok=True)
            with (run.workdir / status.LOG).open("ab") as log:
                log_start = log.tell()
                process = subprocess.Popen(
                    run.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | slot.environment,
                    pass_fds=(self._held,),
                    process_group=0,  # so that Ctrl-C comes to it from here alone, once
                )
        except OSError as error:
            self._set(run, state=State.FAILED, error=f"{error.filename}: {error.strerror}.")
            return
        if slot.cores:
            # Long before it has threads, which inherit it.
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, slot.cores)
        self._free.remove(number)
        self._alive.append(_Attempt(run, process, number, log_start))
        self._set(run, state=State.RUNNING)

    def _ended(self, attempt: _Attempt) -> None:
        self._alive.remove(attempt)
        self._free.append(attempt.slot)
        run = attempt.run
        now = status.read(run)
        if attempt.process.returncode or now.state is not State.DONE:
            now = dataclasses.replace(now, state=State.FAILED, error=attempt.error())
            with contextlib.suppress(OSError):  # a full disk, which the others may survive
                (run.workdir / status.ERROR).write_text(now.error + "\n")
        self.statuses[run.name] = now

    def _set(self, run: Run, **changes: Any) -> None:
        self.statuses[run.name] = dataclasses.replace(self.statuses[run.name], **changes)
