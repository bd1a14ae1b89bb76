"""C++ kernels for CPUs, for the operations that XLA's own take several times as long for.

They are compiled once for a machine, by its C++ compiler, when a network first needs them, and kept
(see library). Where there is no compiler nothing is lost but time, and a warning says so. Set
RESFLAX_NATIVE=0 to do without them.
"""

import ctypes
import functools
import os
import subprocess
import warnings
from typing import Any

import jax

from resflax.ops import library, varying

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
    """Whether the kernels are there, after an attempt to compile them; then XLA knows them.

    Where they cannot be had a warning says why, once.
    """
    if os.environ.get("RESFLAX_NATIVE") == "0":
        return False
    try:
        loaded = ctypes.CDLL(str(library.compiled()))
        functions = {name: getattr(loaded, f"Resflax{name}") for name in HANDLERS}
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"Steps on this CPU take several times as long without the compiled kernels: "
            f"{_reason(error)}. RESFLAX_NATIVE=0 does without them, and without this warning.",
            stacklevel=2,
        )
        return False
    for name, function in functions.items():
        jax.ffi.register_ffi_target(_target(name), jax.ffi.pycapsule(function), platform="cpu")
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


def _reason(error: Exception) -> str:
    """A line; of a compiler's errors the first."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    said = error.stderr.decode(errors="replace").splitlines()
    wrong = next((line for line in said if "error" in line), f"exit code {error.returncode}")
    return f"{error.cmd[0]} failed: {wrong}"
