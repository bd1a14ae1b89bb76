"""Ctrl-C in a command line of this package: one line and exit code 130, from the first import on.

The libraries take seconds to import, before any command's own code runs; so `import resflax` comes
here first. In a program of the user's nothing is changed.
"""

import os
import signal
import sys
import threading
import types
from typing import Any

_CODE = 128 + signal.SIGINT

# Seconds in which an interrupted process ends by itself, unless the interrupt was swallowed.
_PATIENCE = 10.0


def is_command() -> bool:
    """Whether this process is one of this project's commands, such as `python -m resflax.main`."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None:
        return spec.name.partition(".")[0] in ("resflax", "launch", "benchmarks")
    # While Python looks for the module, which imports the package that it is in.
    asked = [argument.removeprefix("-m").partition(".")[0] for argument in sys.orig_argv]
    return sys.argv[:1] == ["-m"] and "resflax" in asked


def handle_interrupts() -> None:
    """Ends a command line without a traceback where Ctrl-C ends it; elsewhere does nothing."""
    if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        sys.excepthook = _show
        sys.unraisablehook = _end_unraised


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    """Raises KeyboardInterrupt; ends the process where that may be swallowed, or was.

    It may be within an import; it was, in a callback of jax say, where the process is still there
    a while later.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            _end()
        frame = frame.f_back
    watch = threading.Timer(_PATIENCE, _end)
    watch.daemon = True
    watch.start()
    raise KeyboardInterrupt


def _end_unraised(unraisable: Any) -> None:
    """Ends the process where the interrupt came in a callback, which nothing can be raised from."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _end()
    sys.__unraisablehook__(unraisable)


def _end() -> None:
    # Not by print, in whose midst the signal may have come. A progress bar has hidden the cursor.
    os.write(2, (b"\x1b[?25h" if os.isatty(2) else b"") + b"stopped.\n")
    os._exit(_CODE)


def _show(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    if not _is_interrupt(error):
        sys.__excepthook__(kind, error, trace)
        return
    print("stopped.", file=sys.stderr)
    sys.exit(_CODE)


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether an error is a KeyboardInterrupt, or what a library made of one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


handle_interrupts()
