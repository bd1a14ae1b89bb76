"""The CPU kernels as a shared library: compiled once for a machine, kept, checked, then loaded.

Its file's name ends in the SHA-256 of its bytes: a file that was cut short or changed is compiled
anew. Loading it runs it, so its folder is one that nobody but this user (or root) may write to:
$XDG_CACHE_HOME/resflax/kernels, by default ~/.cache/resflax/kernels; where that cannot be,
resflax-UID in the folder for temporary files.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax

SOURCES = pathlib.Path(__file__).with_name("kernels")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC")

# Of the digests in a file's name, so many hexadecimal digits.
_DIGITS = 16, 32


def compiled() -> pathlib.Path:
    """The kernels of this machine; where none are kept, a line on stderr says that they are made.

    Raises:
      OSError: if there is no compiler, or no place to keep what it makes.
      subprocess.SubprocessError: if it fails.
    """
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    compiler = next(filter(None, map(shutil.which, filter(None, names))), None)
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler; Debian's is apt-get install g++")
    folders = list(_folders())
    stem = f"kernels-{_identity(compiler)[: _DIGITS[0]]}"
    for folder in folders:
        for file in sorted(folder.glob(f"{stem}-*.so")):
            if _is_whole(file):
                return file
    library = _compile(compiler)
    for folder in folders:
        with contextlib.suppress(OSError):  # a full disk, or a folder of root's
            return _keep(library, folder, stem)
    raise OSError(f"there is no room for them in {' or '.join(map(str, folders)) or 'any folder'}")


def _folders() -> Iterator[pathlib.Path]:
    """Where the kernels may be, of those folders that nobody else may write to."""
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    folders = [pathlib.Path(tempfile.gettempdir(), f"resflax-{os.geteuid()}")]
    if not cache.startswith("~"):  # a user who is a number alone has no home
        folders.insert(0, pathlib.Path(cache, "resflax", "kernels"))
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_own(folder):
                yield folder


def _is_own(path: pathlib.Path) -> bool:
    """Whether it belongs to this user, or to root, and nobody else may write to it."""
    status = path.stat()
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022


def _is_whole(file: pathlib.Path) -> bool:
    """Whether it is what its name says; one that is not is deleted."""
    with contextlib.suppress(OSError):
        if _is_own(file) and file.stem.endswith(f"-{_digest(file.read_bytes())}"):
            return True
        file.unlink()
    return False


def _digest(library: bytes) -> str:
    return hashlib.sha256(library).hexdigest()[: _DIGITS[1]]


def _identity(compiler: str) -> str:
    """A digest of what the kernels are made of."""
    # What the compiler predefines tells its version and the processor's instructions: home folders
    # are shared by unlike machines.
    macros = _run(compiler, "-dM", "-E", "-x", "c++", os.devnull)
    texts = [file.read_bytes() for file in sorted(SOURCES.iterdir())]
    return hashlib.sha256(b"\0".join([*texts, macros, jax.__version__.encode()])).hexdigest()


def _compile(compiler: str) -> bytes:
    """The library."""
    sources = sorted(SOURCES.glob("*.cc"))
    print(
        f"resflax: {compiler} compiles the CPU kernels, once for this machine; this takes half a "
        "minute or more ...",
        end="",
        file=sys.stderr,
        flush=True,
    )
    start, ending = time.monotonic(), " failed"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            objects = [pathlib.Path(scratch, f"{file.stem}.o") for file in sources]
            flags = ("-c", "-isystem", jax.ffi.include_dir())
            with concurrent.futures.ThreadPoolExecutor() as pool:
                jobs = [
                    pool.submit(_run, compiler, *flags, file, "-o", target)
                    for file, target in zip(sources, objects, strict=True)
                ]
            for job in jobs:
                job.result()
            library = pathlib.Path(scratch, "kernels.so")
            _run(compiler, "-shared", *objects, "-o", library)
            content = library.read_bytes()
        ending = f" {time.monotonic() - start:.0f} s"
    finally:
        print(ending, file=sys.stderr, flush=True)
    return content


def _keep(library: bytes, folder: pathlib.Path, stem: str) -> pathlib.Path:
    """Writes it into a folder, whole or not at all: another process may be doing the same."""
    file = folder / f"{stem}-{_digest(library)}.so"
    handle, draft = tempfile.mkstemp(dir=folder)
    try:
        with open(handle, "wb") as target:
            target.write(library)
            target.flush()
            os.fsync(handle)
        os.replace(draft, file)
    except BaseException:
        os.unlink(draft)
        raise
    return file


def _run(compiler: str, *arguments: str | pathlib.Path) -> bytes:
    """What the compiler prints."""
    command = [compiler, *_FLAGS, *arguments]
    return subprocess.run(command, capture_output=True, check=True).stdout
