"""Signals: those that ask a launcher to stop, and those that it ends its processes with."""

import contextlib
import math
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Seconds between two looks at processes and signals.
POLL = 0.2


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """While it lasts, SIGINT, SIGTERM and SIGHUP are appended to the list, and do nothing else."""
    received: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup has it ignored
        numbers.append(signal.SIGHUP)
    previous = {n: signal.signal(n, lambda number, _: received.append(number)) for n in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def end(
    processes: Sequence[subprocess.Popen[Any]],
    stages: Sequence[tuple[int, float]],
    received: Sequence[int],
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Ends processes, and waits until they have ended.

    Args:
      processes: some may have ended already.
      stages: signals, and the seconds to wait for each before the next, stronger one.
      received: signals to this process; another one while this waits goes to the next stage.
      meanwhile: called while it waits.
    """
    for number, seconds in [*stages, (signal.SIGKILL, math.inf)]:
        before, deadline = len(received), time.monotonic() + seconds
        for process in processes:
            process.send_signal(number)  # none to one that has ended
        while any(process.poll() is None for process in processes):
            meanwhile()
            if len(received) > before or time.monotonic() > deadline:
                break
            time.sleep(POLL)
        else:
            return


def ending(code: int) -> str:
    """How a process ended: 'ended with code 2', or 'was ended by SIGKILL'."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
