"""Operands that vary over the same mapped axes, as custom gradients under jax.shard_map want.

A gradient is the same on all devices where its operand is, so JAX sums it over them; but it does
so for its own operations only. An operand that is cast first has a gradient of its own on each
device, and the cast's gradient is the sum. Without shard_map's check_vma nothing is cast.
"""

from typing import Any

import jax
from jax import lax


def alike(*trees: Any) -> tuple[Any, ...]:
    """The same trees of arrays, all varying over the axes that any of them varies over."""

    def axes(x: jax.Array) -> frozenset[str]:
        return jax.typeof(x).manual_axis_type.varying

    union = frozenset().union(*map(axes, jax.tree.leaves(trees)))
    return jax.tree.map(lambda x: lax.pcast(x, tuple(union - axes(x)), to="varying"), trees)
