"""Convolutions of narrow groups on a CPU by the kernels of convolution.cc.

XLA's own take several times as long where a group has fewer than a hundred channels or so. The
kernels are compiled once for a machine, by its C++ compiler, when a network first needs them, and
kept in the user's cache folder. Where there is no compiler nothing is lost but time. Set
RESFLAX_NATIVE=0 to do without them.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

SOURCE = pathlib.Path(__file__).with_name("convolution.cc")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")

# Channels of a group that the kernels are compiled for. Narrower ones share a vector of 16.
_WIDTHS = (16, 32, 64, 128)
_NARROW = (1, 2, 4, 8)

Padding = Sequence[tuple[int, int]]


def supports(
    image_shape: Sequence[int], kernel_shape: Sequence[int], *, stride: int, groups: int
) -> bool:
    """Whether there are kernels for such a float32 convolution; shapes as in conv.conv2d."""
    inputs, outputs = kernel_shape[2], kernel_shape[3] // groups
    wide = inputs in _WIDTHS and outputs in _WIDTHS
    narrow = inputs == outputs and inputs in _NARROW and image_shape[-1] % 16 == 0
    return stride <= 2 and min(image_shape) > 0 and (wide or narrow)


@functools.cache
def available() -> bool:
    """Whether the kernels are there, after an attempt to compile them; they are XLA's from then."""
    if os.environ.get("RESFLAX_NATIVE") == "0":
        return False
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError):
        return False
    for name in ("Forward", "ImageGradient", "KernelGradient"):
        handler = jax.ffi.pycapsule(getattr(library, f"Resflax{name}"))
        jax.ffi.register_ffi_target(_target(name), handler, platform="cpu")
    return True


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int
) -> jax.Array:
    """What conv.conv2d computes, of float32 arrays that `supports` is true of."""
    out = [
        (n + sum(p) - k) // stride + 1
        for n, p, k in zip(x.shape[1:3], padding, kernel.shape[:2], strict=True)
    ]
    shape = (x.shape[0], *out, kernel.shape[-1])
    return _call("Forward", shape, x, kernel, stride, padding, groups)


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve(x, kernel, stride, padding, groups), (x, kernel)


def _backward(
    stride: int,
    padding: Padding,
    groups: int,
    saved: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    return (
        _call("ImageGradient", x.shape, dy, kernel, stride, padding, groups),
        _call("KernelGradient", kernel.shape, x, dy, stride, padding, groups),
    )


convolve.defvjp(_forward, _backward)


def _call(
    name: str,
    shape: Sequence[int],
    first: jax.Array,
    second: jax.Array,
    stride: int,
    padding: Padding,
    groups: int,
) -> jax.Array:
    call = jax.ffi.ffi_call(
        _target(name), jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential"
    )
    return call(
        first,
        second,
        groups=np.int64(groups),
        stride=np.int64(stride),
        top=np.int64(padding[0][0]),
        left=np.int64(padding[1][0]),
    )


def _target(name: str) -> str:
    return f"resflax_convolution_{name}"


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
    macros = subprocess.run(
        [compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, check=True
    ).stdout
    includes = jax.ffi.include_dir()
    identity = b"\0".join([SOURCE.read_bytes(), macros, jax.__version__.encode()])
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    library = folder / "resflax" / f"convolution-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = pathlib.Path(scratch) / library.name
            subprocess.run(
                [compiler, *_FLAGS, "-isystem", includes, "-o", made, SOURCE],
                capture_output=True,
                check=True,
            )
            made.replace(library)  # at once: another process may be doing the same
    return library
