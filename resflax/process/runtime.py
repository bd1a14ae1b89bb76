"""What a process sets before jax starts: convolutions, memory and a cache of compiled programs.

The command lines call `configure()` first; a script that trains or evaluates gains as much:

    from resflax import runtime
    runtime.configure()

What the user has set in the environment, or in jax.config, stays as it is.
"""

import contextlib
import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import io
import mmap
import os
import pathlib
import platform
import sys
import warnings
from typing import Any

import jax
import jax.monitoring
import jaxlib

# XLA:CPU lowers convolutions to YNNPACK, which is slower here than the Eigen they replace;
# reductions and matrix products stay with it.
_CONVOLUTION_FLAG = "xla_cpu_experimental_ynn_fusion_type"
_CONVOLUTION_VALUE = "individual_convolution"

_DETERMINISTIC_FLAG = "xla_gpu_deterministic_ops"

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

# Seconds: what takes jax longer to compile is kept. Its default of one second leaves out the many
# short programs of an initialisation and an evaluation.
_MIN_COMPILE_SECONDS = 0.1


def configure() -> None:
    """Sets the process up; before its first jax array, and once is enough.

    Where jax can only run on a CPU, that is where JAX_PLATFORMS is 'cpu' or is not set and no
    accelerator's plugin is installed:

    - convolutions by XLA's Eigen instead of YNNPACK, unless XLA_FLAGS says which;
    - freed memory stays in the process, with glibc: otherwise every step maps its temporaries anew,
      and the page faults take a tenth of it. Not where MALLOC_... or GLIBC_TUNABLES tune malloc.

    Both are left out beside an accelerator: its plugin may not know the flag, and aborts, and one
    arena would hold up the many threads that load data there.

    On every platform, what jax compiles is kept in $XDG_CACHE_HOME/resflax/xla, by default
    ~/.cache/resflax/xla. JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
    """
    if _only_cpu():
        _choose_convolutions()
        _keep_memory()
    _keep_compilations()


def make_deterministic() -> None:
    """Keeps GPUs to kernels that give the same bits each time; before the process's first array.

    Others add up in the order in which threads come, as in the gradients of some convolutions and
    poolings; without them a step takes longer, and how much depends on the network. Processors and
    TPUs are deterministic as they are.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if _DETERMINISTIC_FLAG not in flags and _jaxlib_has(f"{_DETERMINISTIC_FLAG}\0"):
        os.environ["XLA_FLAGS"] = f"{flags} --{_DETERMINISTIC_FLAG}=true".strip()


def keep_going_unheard() -> None:
    """Discards printed text that cannot be written: the disk is full, or the reader is gone.

    Without this, a full disk under its log would end a run.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            descriptor = stream.fileno()
            stream.flush()
        except (AttributeError, OSError, ValueError):  # there is none, or no file behind it
            continue
        # Without a buffer, which would keep what cannot be written and fail again at the exit.
        output: Any = _Output(descriptor, "w", closefd=False)
        wrapper = io.TextIOWrapper(output, stream.encoding, stream.errors, write_through=True)
        setattr(sys, name, wrapper)


class _Output(io.FileIO):
    def write(self, data: Any) -> int:
        rest = bytes(data)
        with contextlib.suppress(OSError):
            while rest:
                rest = rest[os.write(self.fileno(), rest) :]
        return len(data)


@dataclasses.dataclass
class Programs:
    """How many programs jax has compiled so far, and how many it has read from its cache instead.

    Those are left out that compile in too short a time to be kept.
    """

    compiled: int = 0
    cached: int = 0


def count_programs() -> Programs:
    """Begins to count, in what is returned."""
    programs = Programs()

    def note(event: str, **_: object) -> None:
        programs.compiled += event == "/jax/compilation_cache/cache_misses"
        programs.cached += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_listener(note)
    return programs


def _only_cpu() -> bool:
    platforms = jax.config.values["jax_platforms"]
    if platforms:
        return platforms == "cpu"
    plugins = [importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu")]
    return not any(plugins) and not importlib.metadata.entry_points(group="jax_plugins")


def _choose_convolutions() -> None:
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if _CONVOLUTION_FLAG in flags:
        return
    if flags and not flags.startswith("-"):  # the name of a file with flags: nothing to append to
        return
    # An unknown flag, or an unknown value, aborts the process.
    if _jaxlib_has(f"{_CONVOLUTION_FLAG}\0", _CONVOLUTION_VALUE.upper()):
        os.environ["XLA_FLAGS"] = f"{flags} --{_CONVOLUTION_FLAG}=-{_CONVOLUTION_VALUE}".strip()


def _jaxlib_has(*texts: str) -> bool:
    """Whether the library that XLA is in, by far jaxlib's largest file, holds these strings."""
    try:
        files = [path for path in pathlib.Path(jaxlib.__path__[0]).iterdir() if path.is_file()]
        library = max(files, key=lambda path: path.stat().st_size)
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return all(data.find(text.encode()) >= 0 for text in texts)
    except (OSError, ValueError):
        return False


def _keep_memory() -> None:
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    tuned |= any(name.startswith("MALLOC_") for name in os.environ)
    if tuned or platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)


def _keep_compilations() -> None:
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(cache) / "resflax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        folder, reason = None, str(error)
    else:
        reason = f"{folder} cannot be written to"
    # Told once here; jax would warn at every program.
    if folder is None or not os.access(folder, os.W_OK | os.X_OK):
        warnings.warn(
            f"Compiled programs are not kept for the next start: {reason}. "
            "XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR can name another folder.",
            stacklevel=3,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
