"""Kernels for CPUs that are compiled from C++: what XLA's own take several times as long for.

They are compiled once for a machine, by its C++ compiler, when a network first needs them, and kept
in the user's cache folder. Where there is no compiler nothing is lost but time. Set
RESFLAX_NATIVE=0 to do without them.
"""

import concurrent.futures
import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
from typing import Any

import jax

from resflax.ops import varying

SOURCES = pathlib.Path(__file__).with_name("kernels")
HANDLERS = (
    "Forward",
    "ImageGradient",
    "KernelGradient",
    "WinogradForward",
    "WinogradImageGradient",
    "WinogradKernelGradient",
    "Moments",
    "MomentsGradient",
    "Affine",
    "AffineGradient",
    "Product",
    "ProductGradient",
    "MaxPool",
    "MaxPoolGradient",
)
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC")


def usable() -> bool:
    """Whether to use the kernels here: on a CPU, by what holds its part of the batch alone.

    Automatic sharding over several devices would gather the images for what it cannot see into.
    """
    if jax.default_backend() != "cpu":
        return False
    alone = jax.device_count() == 1 or bool(jax.sharding.get_abstract_mesh().manual_axes)
    return alone and available()


@functools.cache
def available() -> bool:
    """Whether the kernels are there, after an attempt to compile them; then XLA knows them."""
    if os.environ.get("RESFLAX_NATIVE") == "0":
        return False
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError):
        return False
    for name in HANDLERS:
        handler = jax.ffi.pycapsule(getattr(library, f"Resflax{name}"))
        jax.ffi.register_ffi_target(_target(name), handler, platform="cpu")
    return True


def call(
    name: str,
    result: Any,
    *arrays: jax.Array,
    aliases: dict[int, int] | None = None,
    **attributes: Any,
) -> Any:
    """Calls a kernel of HANDLERS.

    Args:
      name: of the kernel.
      result: arrays, or structs, with the shapes and dtypes of what it gives out.
      *arrays: its arguments.
      aliases: which arguments' memory, by their numbers, it puts which results into.
      **attributes: its constants, numbers of numpy.

    Raises:
      RuntimeError: if the kernels are not there.
    """
    if not available():
        raise RuntimeError("There are no compiled kernels: they need a C++ compiler.")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), result)
    kernel = jax.ffi.ffi_call(
        _target(name), shapes, vmap_method="sequential", input_output_aliases=aliases
    )
    # JAX takes what comes out for the same on all devices; it differs where an argument does.
    return varying.alike(kernel(*arrays, **attributes), arrays)[0]


def _target(name: str) -> str:
    return f"resflax_{name}"


def _compiled() -> pathlib.Path:
    """The compiled kernels of this machine.

    Raises:
      OSError: if there is no compiler, or no place to put what it makes.
      subprocess.SubprocessError: if it fails.
    """
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    compiler = next(filter(None, map(shutil.which, filter(None, names))), None)
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler.")
    # What the compiler predefines tells its version and the processor's instructions: home folders
    # are shared by unlike machines.
    macros = _run(compiler, "-dM", "-E", "-x", "c++", os.devnull)
    files = sorted(SOURCES.iterdir())
    sources = [file for file in files if file.suffix == ".cc"]
    texts = [file.read_bytes() for file in files]
    identity = hashlib.sha256(b"\0".join([*texts, macros, jax.__version__.encode()]))
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "resflax"
    library = folder / f"kernels-{identity.hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = pathlib.Path(scratch)
            objects = [made / f"{file.stem}.o" for file in sources]
            flags = ("-c", "-isystem", jax.ffi.include_dir())
            with concurrent.futures.ThreadPoolExecutor() as pool:
                jobs = [
                    pool.submit(_run, compiler, *flags, file, "-o", target)
                    for file, target in zip(sources, objects, strict=True)
                ]
            for job in jobs:
                job.result()
            _run(compiler, "-shared", *objects, "-o", made / library.name)
            (made / library.name).replace(library)  # at once: another process may be doing the same
    return library


def _run(compiler: str, *arguments: str | pathlib.Path) -> bytes:
    """What the compiler prints."""
    command = [compiler, *_FLAGS, *arguments]
    return subprocess.run(command, capture_output=True, check=True).stdout
