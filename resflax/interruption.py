"""Ctrl-C where a run can stop: between two steps, and not in a library that is writing a file."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[int], None]]:
    """While it lasts, SIGINT waits until it is asked for; a second one does not wait.

    Several processes stop after the same step, also where one of them alone is interrupted; there
    a SIGTERM, of which jax takes note in each of them, counts as a SIGINT.

    Signals come to the main thread of a process only: in another one nothing is changed.

    Yields:
      What asks, before the step that follows so many: it raises KeyboardInterrupt if there was one.
    """
    pending = False
    asked: int | None = None

    def note(*_: object) -> None:
        nonlocal pending
        if pending:
            raise KeyboardInterrupt
        pending = True
        if jax.distributed.is_initialized():
            signal.raise_signal(signal.SIGTERM)

    def ask(step: int) -> None:
        nonlocal asked
        first = step if asked is None else asked + 1
        asked = step
        if not jax.distributed.is_initialized():
            reached = pending
        else:
            # About each number, since jax chooses one that no process has come to yet.
            numbers = range(first, step + 1)
            reached = any(multihost_utils.reached_preemption_sync_point(n) for n in numbers)
            if reached:
                # Who leaves while another still compiles its first step would be taken for dead.
                multihost_utils.sync_global_devices("stop")
        if reached:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield ask
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield ask
    finally:
        signal.signal(signal.SIGINT, previous)
