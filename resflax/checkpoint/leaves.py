"""Checksums of arrays: on the devices, where a state is saved, and on the host, where it is read.

Fletcher's, in 32-bit words: the sum of the words, and the sum of the words times their places,
counted from 1, both modulo 2**32. It is two sums, which any device has at the speed of its memory,
where a CRC would have to bring every state to the host in between two steps.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflax.checkpoint.manifest import Leaf
from resflax.checkpoint.store import CheckpointError
from resflax.models import repeat


def checksums(items: dict[str, Any], loops: repeat.Loops) -> dict[str, Any]:
    """The checksums of a state's arrays, each uint32 [2], computed while the host goes on.

    Args:
      items: trees of arrays on the devices, packed: see models.repeat.
      loops: of the network. Their blocks have a checksum each, stacked: [blocks, 2].
    """
    return _checksums(items, frozenset(repeat.packed_name(names) for names in loops))


@functools.partial(jax.jit, static_argnums=1)
def _checksums(items: dict[str, Any], stacked: frozenset[str]) -> dict[str, Any]:
    def one(path: Any, array: jax.Array) -> jax.Array:
        if any(getattr(key, "key", None) in stacked for key in path):
            return jax.vmap(_checksum)(array)
        return _checksum(array)

    return jax.tree_util.tree_map_with_path(one, items)


def _checksum(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype != jnp.bool_:
        bits = 8 * min(array.dtype.itemsize, 4)
        array = lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}"))
    words = array.astype(jnp.uint32).ravel()
    places = lax.iota(jnp.uint32, words.size) + 1
    sums = [jnp.sum(w, dtype=jnp.uint32) for w in (words, words * places)]
    return jnp.stack(sums)


def checksum(array: np.ndarray) -> tuple[int, int]:
    """The same of an array on the host."""
    words = np.ascontiguousarray(array).reshape(-1)
    words = words.view(f"u{min(words.itemsize, 4)}").astype(np.uint32)
    places = np.arange(1, words.size + 1, dtype=np.uint32)
    return int(words.sum(dtype=np.uint32)), int((words * places).sum(dtype=np.uint32))


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, by their paths, such as 'variables/params/head/kernel'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def not_finite(tree: Any, loops: repeat.Loops = ()) -> str | None:
    """The path of the first array that has a number that is not finite; None if there is none.

    On the host, which reads the parameters of a ResNet-50 in a tenth of a second: a program for the
    devices would take many times as long to compile.

    Args:
      tree: of arrays of numbers, packed: see models.repeat.
      loops: of the network.
    """
    arrays = by_path(repeat.unpack(jax.device_get(tree), loops))
    return next((path for path, x in arrays.items() if not np.isfinite(x).all()), None)


def shape_and_dtype(array: Any) -> tuple[tuple[int, ...], str]:
    """Of an array, or of what describes one; a random key is its data."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.eval_shape(jax.random.key_data, array)
    return tuple(array.shape), str(array.dtype)


def num_bytes(array: Any) -> int:
    """Of an array, or of what describes one."""
    shape, dtype = shape_and_dtype(array)
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def describe(shapes: dict[str, tuple[tuple[int, ...], str]], sums: Any) -> dict[str, Leaf]:
    """The leaves for a manifest.

    Args:
      shapes: and dtypes, by path.
      sums: the checksums, [2], in trees of the same structure.
    """
    return {
        path: Leaf(*shapes[path], (int(pair[0]), int(pair[1])))
        for path, pair in by_path(sums).items()
    }


def require_same(saved: dict[str, Leaf], wanted: Any, what: str) -> None:
    """Raises CheckpointError, which names a leaf, unless the arrays are those that are wanted.

    Args:
      saved: of the manifest.
      wanted: trees of shapes.
      what: is restored, for the message.
    """
    expected = {path: shape_and_dtype(array) for path, array in by_path(wanted).items()}
    for path in [*expected, *saved]:
        if path not in saved:
            raise CheckpointError(f"{what} has no {path}, which this run has.")
        if path not in expected:
            raise CheckpointError(f"{what} has {path}, which this run has not.")
        shape, dtype = expected[path]
        if (saved[path].shape, saved[path].dtype) != (shape, dtype):
            raise CheckpointError(
                f"{what} has {path} as {saved[path]}; in this run it is {dtype} {list(shape)}."
            )


def require_checksums(saved: dict[str, Leaf], sums: Any, what: str) -> None:
    """Raises CheckpointError, which names a leaf, unless the arrays are those that were saved.

    Args:
      saved: of the manifest.
      sums: the checksums of what was restored, in trees.
      what: was restored, for the message.
    """
    for path, pair in by_path(sums).items():
        if saved[path].checksum != (int(pair[0]), int(pair[1])):
            raise CheckpointError(f"{what} is damaged: {path} is not what was saved.")
