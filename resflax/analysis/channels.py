"""Numbers of each channel of an array, over all images and positions, batch by batch."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The values of the activations that die or saturate. What leaves its range, such as a sum that no
# activation follows, is none's.
RANGES = {"relu": (0.0, math.inf), "sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0)}

# Of an asymptote: what is nearer is saturated.
NEAR = 0.01


class Channels(NamedTuple):
    """Of each channel of an array, float32 [C] each.

    Attributes:
      zeros: share of its values that are zero.
      low, high: shares that are near the lower and the upper end of a range.
      least, greatest: value.
    """

    zeros: Any
    low: Any
    high: Any
    least: Any
    greatest: Any


def counted(x: jax.Array, act: str) -> Channels:
    """Of an array whose channels are its last axis; the range is that of an activation."""
    y = x.astype(jnp.float32)
    bottom, top = RANGES[act]
    axes = tuple(range(y.ndim - 1))
    return Channels(
        zeros=jnp.mean(y == 0, axes),
        low=jnp.mean(y < bottom + NEAR, axes),
        high=jnp.mean(y > top - NEAR, axes),
        least=jnp.min(y, axes),
        greatest=jnp.max(y, axes),
    )


def joined(sizes: Sequence[int], *batches: Channels) -> Channels:
    """Of all batches, of each batch's and the numbers of their images."""
    zeros, low, high, least, greatest = map(np.stack, zip(*batches, strict=True))
    shares = (np.average(share, axis=0, weights=sizes) for share in (zeros, low, high))
    return Channels._make([*shares, np.min(least, axis=0), np.max(greatest, axis=0)])


def concatenated(places: Sequence[Channels]) -> Channels | None:
    """The channels of all places, one after another."""
    return Channels._make(map(np.concatenate, zip(*places, strict=True))) if places else None
