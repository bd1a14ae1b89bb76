"""Writes files and directories so that a power cut leaves them whole or not there."""

import contextlib
import errno
import os
import pathlib


def write(path: pathlib.Path, data: bytes, *, durable: bool = True) -> None:
    """Writes or replaces a file: beside it, and then renamed.

    The target of a link is replaced, not the link. A device or a pipe is written to.

    Args:
      path: of the file; its directory exists.
      data: the whole of it.
      durable: whether to wait for the disk, so that the file outlives a power cut.

    Raises:
      OSError: if it cannot be written; what was there is there, and nothing stays beside it.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path = path.resolve()
    # The process id keeps two writers apart; the name keeps the umask's permissions.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    if durable:
        sync(path.parent)


def make_directory(path: pathlib.Path) -> None:
    """Makes a directory, with those above it, so that a power cut leaves them.

    Raises:
      OSError: if it cannot be made.
    """
    if path.exists():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def sync(path: pathlib.Path) -> None:
    """Returns when the bytes of a file, or the names in a directory, are on the disk.

    Raises:
      OSError: if they cannot be brought there.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # one that may be written and not be listed
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems have nothing to do for a directory.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: pathlib.Path) -> None:
    """Returns when a directory is on the disk, with all that is in it.

    Raises:
      OSError: if it cannot be brought there.
    """
    for root, _, names in os.walk(folder):
        for path in (*(pathlib.Path(root, name) for name in names), pathlib.Path(root)):
            sync(path)
