"""Equal blocks in a row, as one loop: a network that compiles in a time independent of its depth.

Every block has its own variables under its own name, whether it is in a loop or not, so that
checkpoints and scripts need not know. While it trains, a network's variables can be packed: those
of a loop's blocks are stacked under one name. Else the compiled step would have outputs, and
kernels that write them, in proportion to the depth.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

# The names of each loop's blocks, in the order of their use.
Loops = tuple[tuple[str, ...], ...]


def packed_name(names: Sequence[str]) -> str:
    """Of the packed variables of a loop over these blocks."""
    return f"{names[0]}..{names[-1]}"


def pack(tree: Any, loops: Loops) -> Any:
    """Stacks the variables of loops, wherever they are in `tree`: a state of an optimizer, say."""

    def is_unpacked(node: Any) -> bool:
        return isinstance(node, dict) and any(names[0] in node for names in loops)

    def stack(node: Any) -> Any:
        if not is_unpacked(node):
            return node
        packed = dict(node)
        for names in loops:
            packed[packed_name(names)] = _stack([packed.pop(name) for name in names])
        return packed

    return jax.tree.map(stack, tree, is_leaf=is_unpacked)


def unpack(tree: Any, loops: Loops) -> Any:
    """The inverse of `pack`."""

    def is_packed(node: Any) -> bool:
        return isinstance(node, dict) and any(packed_name(names) in node for names in loops)

    def unstack(node: Any) -> Any:
        if not is_packed(node):
            return node
        unpacked = dict(node)
        for names in loops:
            stacked = unpacked.pop(packed_name(names))
            for i, name in enumerate(names):
                unpacked[name] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        return unpacked

    return jax.tree.map(unstack, tree, is_leaf=is_packed)


def create(
    network: nn.Module, block: nn.Module, names: Sequence[str], x: jax.Array, *, packed: bool
) -> None:
    """Initialises the variables of equal blocks, inside a compact method of `network`.

    In one loop, which compiles once, also where the blocks then run one by one: the initial values
    do not depend on that.

    Args:
      network: the owner of the blocks.
      block: one of them, without a parent.
      names: of them all.
      x: what the first of them takes; only its shape and dtype matter.
      packed: whether they are one packed variable, or each block's own.
    """
    keys = jax.random.split(network.make_rng("params"), len(names))
    zeros = jnp.zeros(x.shape, x.dtype)
    stacked = lax.map(lambda key: block.init({"params": key, "dropout": key}, zeros), keys)
    for collection in stacked.keys() & {"params", "batch_stats"}:
        _write(network, collection, names, stacked[collection], packed)


def loop(
    network: nn.Module,
    block: nn.Module,
    names: Sequence[str],
    x: jax.Array,
    *arguments: jax.Array,
    packed: bool,
) -> jax.Array:
    """Applies equal blocks one after another, inside a compact method of `network`.

    What a block would sow, or an interceptor see, is lost: only its running statistics come out.

    Args:
      network: the owner of the blocks.
      block: one of them, without a parent.
      names: of them all, in the order of their use.
      x: what the first of them takes; all give out this shape.
      *arguments: further arguments of the blocks: row i is the i-th block's.
      packed: see `create`.
    """
    owned = [packed_name(names)] if packed else names
    stacked = {}
    for collection in ("params", "batch_stats"):
        if network.has_variable(collection, owned[0]):
            variables: list[Any] = [network.get_variable(collection, name) for name in owned]
            stacked[collection] = variables[0] if packed else _stack(variables)
    # No statistics move while a network is initialised.
    updates = network.is_mutable_collection("batch_stats") and not network.is_initializing()
    keys = None
    if network.has_rng("dropout"):
        keys = jax.random.split(network.make_rng("dropout"), len(names))

    def step(x: jax.Array, row: Any) -> tuple[jax.Array, Any]:
        variables, key, arguments = row
        rngs = {} if key is None else {"dropout": key}
        return block.apply(
            variables, x, *arguments, rngs=rngs, mutable=["batch_stats"] if updates else []
        )

    x, updated = lax.scan(step, x, (stacked, keys, arguments))
    if "batch_stats" in updated:
        _write(network, "batch_stats", names, updated["batch_stats"], packed)
    return x


def _write(
    network: nn.Module, collection: str, names: Sequence[str], stacked: Any, packed: bool
) -> None:
    variables = {packed_name(names): stacked}
    if not packed:
        variables = unpack(variables, (tuple(names),))
    for key, value in variables.items():
        network.put_variable(collection, key, value)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
