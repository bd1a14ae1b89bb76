"""Arrays of another library, read into a network's variables and written from them.

A layout is data: a list of entries, each of which says where an array stands in our tree, what the
other library calls it, and how its axes are arranged there. The same entries serve both directions.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from resflax.errors import UserError
from resflax.models import layers

Path = tuple[str, ...]
Variables = dict[str, Any]

# How many keys of each kind an error names.
_NAMED = 4


@dataclasses.dataclass(frozen=True)
class Transform:
    """How an array of ours is laid out elsewhere.

    Both functions do nothing but index, transpose and reshape, so that they take tracers too (the
    expected shapes are computed by tracing), lose no bit, and undo each other.

    Attributes:
      write: from our array to the other library's.
      read: the inverse.
    """

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


AS_IS = Transform(lambda x: x, lambda x: x)

# [in, out] <-> [out, in].
LINEAR = Transform(lambda x: x.T, lambda x: x.T)

# [height, width, in, out] <-> [out, in, height, width].
CONV = Transform(lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0))

# A dense layer that is a 1x1 convolution elsewhere: [in, out] <-> [out, in, 1, 1].
POINTWISE = Transform(lambda x: x.T[:, :, None, None], lambda x: x[:, :, 0, 0].T)


def flattened(height: int, width: int) -> Transform:
    """Of a dense layer on flattened maps: rows are (height, width, channel) here and CHW there."""
    convolution = as_convolution(height, width)

    def write(x: Any) -> Any:
        return convolution.write(x).reshape(x.shape[1], x.shape[0])

    def read(x: Any) -> Any:
        return convolution.read(x.reshape(x.shape[0], -1, height, width))

    return Transform(write, read)


def as_convolution(height: int, width: int) -> Transform:
    """Of a dense layer on flattened maps that is an unpadded convolution elsewhere, OIHW."""

    def write(x: Any) -> Any:
        return CONV.write(x.reshape(height, width, -1, x.shape[1]))

    def read(x: Any) -> Any:
        return CONV.read(x).reshape(-1, x.shape[0])

    return Transform(write, read)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array.

    Attributes:
      path: in our variables: the collection ('params' or 'batch_stats'), modules, the array's name.
      key: the other library's name.
      transform: between the two.
    """

    path: Path
    key: str
    transform: Transform = AS_IS


def read(
    entries: Sequence[Entry], arrays: Mapping[str, np.ndarray], template: Variables
) -> Variables:
    """Variables of a network with the values of another library's arrays.

    Args:
      entries: one for every array of the network.
      arrays: by the other library's names.
      template: the variables' shapes and types: `jax.eval_shape` of the network's `init`.

    Returns:
      Nested dictionaries of jax arrays, of the template's shapes and types, which share no memory
      with `arrays`; without 'head' if only the classifier's arrays are missing.

    Raises:
      UserError: if arrays are missing, too many or of another shape; or the entries are not those
        of the template.
    """
    leaves = flatten(template)
    _check_paths(entries, leaves)
    found = {key: np.shape(array) for key, array in arrays.items()}
    body = [e for e in entries if e.path[1] != "head"]
    if found.keys() == {e.key for e in body}:
        entries = body
    expected = shapes(entries, template)
    check_shapes("the weights", expected, found)
    return flax.traverse_util.unflatten_dict(
        {
            # Copied: the other library may go on to change its arrays in place.
            e.path: jnp.array(e.transform.read(arrays[e.key]), leaves[e.path].dtype)
            for e in entries
        }
    )


def with_head(
    variables: Variables, head: Variables, num_classes: int | None, source: Any
) -> Variables:
    """Variables with a classifier: their own, or else one as at the start of a training.

    Args:
      variables: of a network, perhaps without its 'head'.
      head: shapes and types of the classifier's parameters.
      num_classes: the classes that were asked for.
      source: of the variables, for the message.

    Raises:
      UserError: if the variables have no classifier, and nobody says of how many classes.
    """
    if "head" in variables["params"]:
        return variables
    if num_classes is None:
        where = os.fspath(source) if isinstance(source, str | os.PathLike) else "the mapping"
        raise UserError(
            f"{where} has no classifier (include_top=False of Keras, num_classes=0 of timm): with "
            "num_classes, a new one is made."
        )
    kernel, bias = head["kernel"], head["bias"]
    new = {
        "kernel": layers.torch_uniform(jax.random.key(0), kernel.shape, kernel.dtype),
        "bias": jnp.zeros(bias.shape, bias.dtype),
    }
    return {**variables, "params": {**variables["params"], "head": new}}


def write(entries: Sequence[Entry], variables: Variables) -> dict[str, np.ndarray]:
    """The inverse of `read`: the other library's arrays by their names, in the entries' order.

    Raises:
      UserError: if the entries are not those of the variables.
    """
    leaves = flatten(variables)
    _check_paths(entries, leaves)
    return {
        e.key: np.array(e.transform.write(np.asarray(leaves[e.path])), order="C") for e in entries
    }


def shapes(entries: Sequence[Entry], template: Variables) -> dict[str, tuple[int, ...]]:
    """Of the other library's arrays, by name; nothing is computed."""
    leaves = flatten(template)
    return {e.key: jax.eval_shape(e.transform.write, leaves[e.path]).shape for e in entries}


def flatten(variables: Variables) -> dict[Path, Any]:
    """The parameters and running statistics by their paths."""
    kept = {k: v for k, v in variables.items() if k in ("params", "batch_stats")}
    return flax.traverse_util.flatten_dict(kept)


def check_shapes(
    what: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises UserError, one message, if two tables of shapes differ.

    Args:
      what: has the shapes that were found, for the message.
      expected: shapes by name.
      found: likewise.
    """
    missing = [f"{k} {_shape(expected[k])}" for k in expected if k not in found]
    unexpected = [f"{k} {_shape(found[k])}" for k in found if k not in expected]
    misshapen = [
        f"{k} {_shape(found[k])} where {_shape(expected[k])} is expected"
        for k in expected
        if k in found and tuple(found[k]) != tuple(expected[k])
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    parts = [f"{len(names)} {fault}: {_first(names)}" for fault, names in faults.items() if names]
    if parts:
        raise UserError(
            f"{what} do not fit the network, which has {len(expected)} arrays. {'; '.join(parts)}."
        )


def _check_paths(entries: Sequence[Entry], leaves: Mapping[Path, Any]) -> None:
    paths = {entry.path for entry in entries}
    extra = ["/".join(path) for path in leaves if path not in paths]
    absent = ["/".join(path) for path in paths if path not in leaves]
    if extra:
        raise UserError(f"the layout has no place for {len(extra)} arrays: {_first(extra)}.")
    if absent:
        raise UserError(f"the variables lack {len(absent)} arrays: {_first(sorted(absent))}.")


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
