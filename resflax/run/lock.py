"""One writer at a time in a run's directory, on a local disk or on one that several hosts see.

The lock is a file that names its owner. The owner touches it every few seconds and removes it at
its end. Creation is exclusive, which holds on NFS too. A dead owner is replaced: at once where the
kernel knows that its process is gone, elsewhere when the file has not been touched for a while.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Self

from resflax.errors import UserError

FILE = "run.lock"

# Seconds between two touches of the file, and without one until an owner elsewhere counts as dead.
BEAT = 5.0
STALE = 30.0

# Seconds that a killed process may take to go, and a run that is stopping to save its state.
_DYING = 2.0
_STOPPING = 300.0

_POLL = 0.1


class LockError(UserError):
    """Another process is the directory's writer; the message names it."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """The process that may write.

    Attributes:
      host: its name.
      pid: of the process.
      process: when the process started, so that a later one of the same number is told apart.
      kernel: the boot and the namespace in which `pid` means something; '' where neither is known.
      since: when it took the directory, for a person.
      token: tells this lock from every other.
      stopping: whether it was asked to stop, and is about to.
    """

    host: str
    pid: int
    process: str
    kernel: str
    since: str
    token: str
    stopping: bool = False

    @classmethod
    def here(cls) -> Self:
        """The process that runs this code."""
        since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        pid = os.getpid()
        return cls(platform.node(), pid, _started(pid), _kernel(), since, uuid.uuid4().hex)

    @property
    def is_seen(self) -> bool:
        """Whether this kernel can tell if the process lives."""
        return self.kernel != "" and self.kernel == _kernel()

    @property
    def lives(self) -> bool:
        """Whether the process is there, where it `is_seen`."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's
        return _started(self.pid) in ("", self.process)


_UNKNOWN = Owner("an unknown host", 0, "", "", "just now", "unknown")


class Lock:
    """The lock of a directory, which this process takes, holds and gives back."""

    def __init__(self, directory: pathlib.Path, report: Callable[[str], None]):
        """Takes nothing yet.

        Args:
          directory: to write to; it exists.
          report: called with a line about the process that this one waits for.
        """
        self._path = directory / FILE
        self._owner = Owner.here()
        self._report = report
        self._ended = threading.Event()
        self._beats: threading.Thread | None = None
        self._is_lost = False
        # The other owner: its token, its last touch, and when it was first looked at.
        self._other: tuple[str, float, float] = ("", 0.0, 0.0)

    def take(self) -> bool:
        """Tries once.

        Returns:
          Whether this process holds it; if not, its owner may soon be gone: try again.

        Raises:
          LockError: if its owner is at work, or the directory cannot be written.
        """
        try:
            taken = self._create(self._path) or self._replaced()
        except OSError as error:
            raise LockError(f"{self._path} cannot be written: {error.strerror}.") from None
        if taken:
            self._beats = threading.Thread(target=self._beat, name="lock", daemon=True)
            self._beats.start()
        return taken

    def check(self) -> None:
        """Raises LockError if another process has taken the directory over from this one."""
        if self._beats is not None:
            self._touch()
        if self._is_lost:
            raise LockError(
                f"workdir {self._path.parent} was taken over by another process, since "
                f"{_name(self._owner)} had given no sign of life for {STALE:.0f} s."
            )

    def stopping(self) -> None:
        """Marks the lock, so that other processes wait for this one to end."""
        self._owner = dataclasses.replace(self._owner, stopping=True)
        draft = self._path.with_name(f".{FILE}.{self._owner.token}")
        # Where this cannot be written, others are refused instead.
        with contextlib.suppress(OSError):
            if self._beats is not None and self._is_ours() and self._create(draft):
                draft.replace(self._path)

    def release(self) -> None:
        """Removes the lock if this process holds it."""
        if self._beats is None:
            return
        self._ended.set()
        self._beats.join(BEAT)  # a file server may be away
        with contextlib.suppress(OSError):
            if self._is_ours():
                self._path.unlink()

    def _replaced(self) -> bool:
        """Whether the owner was dead, and this process has its place."""
        owner, touched = self._read()
        if touched is None:
            return False
        if self._is_dead(owner, touched):
            return self._replace(owner)
        self._require_patience(owner, touched)
        time.sleep(_POLL)
        return False

    def _is_dead(self, owner: Owner, touched: float) -> bool:
        if owner.is_seen:
            return not owner.lives
        return _now(self._path.parent) - touched > STALE

    def _replace(self, owner: Owner) -> bool:
        """Takes a dead owner's place, if no other process does.

        The right to it is a file of the dead owner's token, which becomes the lock in one step: at
        no moment is there none.
        """
        claim = self._path.with_name(f"{FILE}.{owner.token}")
        if not self._create(claim):
            with contextlib.suppress(FileNotFoundError):
                if _now(claim.parent) - claim.stat().st_mtime > STALE:
                    claim.unlink()  # of a process that died in the middle of this
            time.sleep(_POLL)
            return False
        if self._read()[0].token != owner.token:
            claim.unlink(missing_ok=True)
            return False
        claim.replace(self._path)
        self._report(f"{self._path.parent}: {_name(owner)} is gone, and left its lock.")
        return True

    def _require_patience(self, owner: Owner, touched: float) -> None:
        """Raises LockError unless the owner may soon be gone."""
        token, first_touched, start = self._other
        if token != owner.token:
            self._other = token, first_touched, start = owner.token, touched, time.monotonic()
            if owner.stopping or not owner.is_seen:
                self._report(f"{self._path.parent}: waiting for {_name(owner)} to end.")
        waited = time.monotonic() - start
        if owner.stopping:
            at_work = waited > _STOPPING
        elif owner.is_seen:
            at_work = waited > _DYING
        else:
            at_work = touched != first_touched
        if at_work:
            raise LockError(
                f"workdir {self._path.parent} is in use by {_name(owner)}, at work since "
                f"{owner.since}; wait for its end, or take another --workdir."
            )

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            self._touch()

    def _touch(self) -> None:
        # A file server that is away for a while is back for the next one.
        with contextlib.suppress(OSError):
            if self._is_ours() or (not self._path.exists() and self._create(self._path)):
                os.utime(self._path)
            elif self._read()[1] is not None:
                self._is_lost = True

    def _is_ours(self) -> bool:
        return self._read()[0].token == self._owner.token

    def _create(self, path: pathlib.Path) -> bool:
        """Makes a file that names this process, unless there is one."""
        try:
            file = path.open("x")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(json.dumps(dataclasses.asdict(self._owner)) + "\n")
        except OSError:  # a full disk
            path.unlink()
            raise
        return True

    def _read(self) -> tuple[Owner, float | None]:
        """The owner, and when it touched the file; None if there is no file."""
        try:
            # Opened, since NFS looks at the server's file then.
            with self._path.open() as file:
                touched = os.fstat(file.fileno()).st_mtime
                return Owner(**json.load(file)), touched
        except FileNotFoundError:
            return _UNKNOWN, None
        except (ValueError, TypeError):  # half written, now or before a power cut
            return _UNKNOWN, touched


@contextlib.contextmanager
def held(
    directory: pathlib.Path,
    report: Callable[[str], None] = print,
    attempt: Callable[[Callable[[], bool]], bool] = lambda take: take(),
) -> Iterator[Lock]:
    """Keeps other writers out of a directory.

    Args:
      directory: of a run; it exists.
      report: called with a line about the process that this one waits for.
      attempt: calls `Lock.take` on the process of several that writes; returns its result on all.

    Yields:
      The lock.

    Raises:
      LockError: if another process is at work there.
    """
    lock = Lock(directory, report)
    while not attempt(lock.take):
        pass
    try:
        yield lock
    finally:
        lock.release()


def _name(owner: Owner) -> str:
    return f"process {owner.pid} on {owner.host}"


def _kernel() -> str:
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # each container has its own numbers
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks; '' where that is not to be seen."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "ended" if state in "ZX" else fields[18]


def _now(directory: pathlib.Path) -> float:
    """The time by the clock of the file system, which may be another host's."""
    with tempfile.TemporaryFile(dir=directory) as file:
        return os.fstat(file.fileno()).st_mtime
