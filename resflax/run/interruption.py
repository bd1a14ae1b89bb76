"""Signals that ask a run to stop: they wait until it can, between two of its steps."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from resflax.process import entry


class Stopped(BaseException):
    """A run was asked to stop, has saved its state, and has stopped.

    Attributes:
      exit_code: of the process: 130 where it was Ctrl-C (SIGINT), 129 where its terminal was
        closed (SIGHUP), 143 where it was SIGTERM, the scheduler's notice of a preemption, or
        another process of the run.
    """

    def __init__(self, exit_code: int):
        super().__init__(exit_code)
        self.exit_code = exit_code


class Requests:
    """Whether the run was asked to stop, and by what.

    Several processes stop after the same step, also where one of them alone was asked.
    """

    def __init__(self, notify: Callable[[], None]):
        """None was made so far.

        Args:
          notify: called as soon as this process knows of the first request.
        """
        self._notify = notify
        self._signal: int | None = None
        self._asked: int | None = None
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    @property
    def exit_code(self) -> int:
        """See Stopped."""
        return 128 + (self._signal or signal.SIGTERM)

    def note(self, number: int, _: object) -> None:
        """A handler of signals: the second one does not wait.

        SIGHUP is neither first nor second: shells, and systemd, send it twice or beside SIGTERM.
        """
        if number == signal.SIGHUP:
            # Writing to a terminal that is gone would fail.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in self._terminals:
                os.dup2(nowhere, terminal)
            if self._signal is not None:
                return
        elif self._signal not in (None, signal.SIGHUP):
            _stop_at_once(128 + number)
        self._signal = number
        self._notify()
        if jax.distributed.is_initialized():
            # Of which jax takes note, in each process.
            signal.raise_signal(signal.SIGTERM)

    def made(self, step: int) -> bool:
        """Whether the run is to stop after so many steps; asked about more of them each time."""
        first = step if self._asked is None else self._asked + 1
        self._asked = step
        if not jax.distributed.is_initialized():
            return self._signal is not None
        # About each number, since jax chooses one that no process has come to yet.
        numbers = range(first, step + 1)
        if not any(multihost_utils.reached_preemption_sync_point(n) for n in numbers):
            return False
        self._notify()
        # Who leaves while another still compiles its first step would be taken for dead.
        multihost_utils.sync_global_devices("stop")
        return True


def _stop_at_once(exit_code: int) -> NoReturn:
    """Ends a command line, as safely as a kill does; elsewhere raises KeyboardInterrupt.

    The exception alone would wait, with all else, for the save that is under way.
    """
    if not entry.is_command():
        raise KeyboardInterrupt
    # Not by print, in whose midst the signal may have come.
    if os.isatty(1):
        os.write(1, b"\x1b[?25h\n")  # the cursor, which a bar hides
    with contextlib.suppress(OSError):
        os.write(2, b"stopped at once; the same command goes on from the last checkpoint.\n")
    os._exit(exit_code)


@contextlib.contextmanager
def deferred(
    notify: Callable[[], None] = lambda: None,
) -> Iterator[Callable[[int], int | None]]:
    """While it lasts, SIGINT, SIGTERM and SIGHUP wait until they are asked for.

    Signals come to the main thread of a process only: in another one nothing is changed. A SIGHUP
    that is ignored, as under nohup, stays so.

    Args:
      notify: called at once where a signal comes, so that others know that the run is stopping.

    Yields:
      What tells after so many steps whether the run is to stop, by its exit code; None: it is not.
    """
    requests = Requests(notify)

    def asked(step: int) -> int | None:
        return requests.exit_code if requests.made(step) else None

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    # With several processes SIGTERM is jax's: it tells the others.
    numbers = [signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    if not jax.distributed.is_initialized():
        numbers.append(signal.SIGTERM)
    previous = {number: signal.signal(number, requests.note) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
