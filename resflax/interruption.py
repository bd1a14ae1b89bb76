"""Ctrl-C where a run can stop: between two steps, and not in a library that is writing a file."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], None]]:
    """While it lasts, SIGINT waits until it is asked for; a second one does not wait.

    Signals come to the main thread of a process only: in another one nothing is changed.

    Yields:
      What asks: it raises KeyboardInterrupt if there was a SIGINT.
    """
    pending = False

    def note(*_: object) -> None:
        nonlocal pending
        if pending:
            raise KeyboardInterrupt
        pending = True

    def ask() -> None:
        if pending:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield ask
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield ask
    finally:
        signal.signal(signal.SIGINT, previous)
