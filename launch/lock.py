"""One sweep at a time in a directory."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator

from resflax.errors import UserError

LOCK = "sweep.lock"


class LockError(UserError):
    """The directory cannot be this sweep's now; the message says why."""


@contextlib.contextmanager
def held(directory: pathlib.Path) -> Iterator[int]:
    """Keeps other sweeps out of a directory, which is made if need be.

    The lock is the kernel's: it goes with the last process that has the file open, whatever ended
    it. A run that has inherited the descriptor holds it too, so that a sweep which was killed is
    not begun again beside the runs that it left. On NFS no run inherits it: there the lock of each
    run's own directory (see resflax.run.lock) keeps a second process out.

    Yields:
      The descriptor of the lock's file.

    Raises:
      LockError: if another sweep has it, or there can be no such directory.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open("a")
    except OSError as error:
        raise LockError(f"--workdir {directory}: {error.strerror}.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockError(
                f"--workdir {directory}: another sweep, or a run that one left behind, is at work "
                "there; wait for its end, or take another directory."
            ) from None
        except OSError as error:  # a file system without locks
            raise LockError(f"{directory / LOCK} cannot be locked: {error.strerror}.") from None
        yield file.fileno()
