"""Tests of how the compiled kernels are kept, with a library that compiles in a moment."""

import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import tempfile

import forked
import pytest

from resflax.ops import library, native

pytestmark = pytest.mark.skipif(not native.available(), reason="there are no compiled kernels")

SOURCE = 'extern "C" int ResflaxOne() { return 1; }\n'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the kernels; folders for temporary files are beside it."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "one.cc").write_text(SOURCE)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(library, "SOURCES", tmp_path / "sources")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "resflax" / "kernels"


def works(file):
    """Whether another process, which it might end, can call what is in the library."""
    code = f"import ctypes; print(ctypes.CDLL({str(file)!r}).ResflaxOne())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).stdout == b"1\n"


def test_they_are_compiled_once_and_one_line_says_so(cache, capfd):
    file = library.compiled()
    told = capfd.readouterr()
    assert re.fullmatch(r"resflax: \S+ compiles the CPU kernels, .* \d+ s\n", told.err)
    assert not told.out
    assert file.parent == cache
    assert works(file)
    written = file.stat().st_mtime_ns
    assert library.compiled() == file
    assert file.stat().st_mtime_ns == written
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "damaged",
    [
        lambda content: content[: len(content) // 2],  # SIGBUS where it is loaded
        lambda content: content[:-8192] + bytes(8192),  # SIGSEGV
        lambda content: b"",
        lambda content: content.replace(b"ResflaxOne", b"ResflaxTwo"),
    ],
    ids=["cut", "zeros", "empty", "symbol"],
)
def test_a_damaged_library_is_compiled_anew(cache, damaged):
    file = library.compiled()
    whole = file.read_bytes()
    file.unlink()  # not in place: whoever has loaded it keeps it
    file.write_bytes(damaged(whole))
    assert not works(file)
    assert works(library.compiled())
    assert all(map(library._is_whole, cache.iterdir()))


def plant(folder):
    """A library of somebody else's, under a name that fits it; returns its file."""
    own = library.compiled()
    stem = own.stem.rpartition("-")[0]
    content = own.read_bytes() + b"planted"
    own.unlink()
    file = folder / f"{stem}-{library._digest(content)}.so"
    file.write_bytes(content)
    return file


def test_a_folder_that_others_may_write_to_is_not_read(cache):
    file = plant(cache)
    assert library.compiled() == file  # as long as nobody else could have put it there
    cache.chmod(0o777)
    found = library.compiled()
    assert found.parent == pathlib.Path(tempfile.gettempdir(), f"resflax-{os.geteuid()}")
    assert stat.S_IMODE(found.parent.stat().st_mode) == 0o700
    assert works(found)
    found.parent.chmod(0o777)
    with pytest.raises(OSError, match="no room for them in any folder"):
        library.compiled()
    assert file.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_belongs_to_another_user_is_not_loaded(cache, what):
    file = plant(cache)
    os.chown(cache if what == "folder" else file, 12345, 12345)
    found = library.compiled()
    assert found != file
    assert works(found)


def test_where_the_cache_cannot_be_made_they_are_kept_among_temporary_files(cache, monkeypatch):
    cache.parents[1].write_text("a file is in the way")
    assert library.compiled().parent.parent == pathlib.Path(tempfile.gettempdir())


def test_a_compiler_that_fails_leaves_nothing(cache, tmp_path, capfd):
    (tmp_path / "sources" / "one.cc").write_text("this is no C++\n")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        library.compiled()
    assert re.search(r" failed: .*one\.cc:1:1: error: ", native._reason(failed.value))
    assert capfd.readouterr().err.endswith("... failed\n")
    assert not list(cache.iterdir())


COMPILED = """
import pathlib
from resflax.ops import library
library.SOURCES = pathlib.Path({!r})
print(library.compiled())
"""


def test_processes_that_compile_at_once_find_one_library(cache):
    code = COMPILED.format(str(library.SOURCES))
    processes = [forked.Process("-c", code) for _ in range(3)]
    files = {process.finish().output.strip() for process in processes}
    assert [pathlib.Path(file) for file in files] == list(cache.iterdir())
    assert works(*files)


AVAILABLE = "from resflax.ops import native; print(native.available())"


def test_damaged_kernels_do_not_end_a_process(tmp_path):
    kept = library.compiled()
    folder = tmp_path / "resflax" / "kernels"
    folder.mkdir(mode=0o700, parents=True)
    (folder / kept.name).write_bytes(kept.read_bytes()[:-200_000])
    # One that does not get to compile them, which takes half a minute.
    compiler = tmp_path / "compiler"
    right = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++"))))
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-dM*) exec {right} "$@";; esac\nexit 1\n')
    compiler.chmod(0o755)
    environment = {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(compiler)}
    result = forked.run("-c", AVAILABLE, environment=environment)
    assert (result.code, result.output) == (0, "False\n")
    assert "compiler failed: exit code 1. RESFLAX_NATIVE=0" in result.errors
    assert not list(folder.iterdir())
