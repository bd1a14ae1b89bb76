"""Ctrl-C in a command line of this package: one line and exit code 130, from the first import on.

The libraries take seconds to import, before any command's own code runs; so `import resflax` comes
here first. In a program of the user's nothing is changed.
"""

import os
import signal
import sys
import types

_CODE = 128 + signal.SIGINT


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


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    """Raises KeyboardInterrupt; within an import, whose code may swallow it, ends the process."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"stopped.\n")  # not by print, in whose midst the signal may have come
            os._exit(_CODE)
        frame = frame.f_back
    raise KeyboardInterrupt


def _show(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("stopped.", file=sys.stderr)
    sys.exit(_CODE)


handle_interrupts()
