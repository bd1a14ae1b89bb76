"""The order of a network's blocks, where blocks of one shape change places."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats


def exchangeable(params: dict[str, Any], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of blocks with parameters of the same shapes."""
    shapes = {n: str(jax.tree.map(jnp.shape, params[n])) for n in names}
    return ((a, b) for a, b in itertools.combinations(names, 2) if shapes[a] == shapes[b])


def swapped(
    names: Sequence[str], pairs: Sequence[tuple[str, str]], number: int, rng: np.random.Generator
) -> list[str]:
    """Whose parameters stand in the place of each block after so many random swaps of the pairs."""
    order = list(names)
    for i in rng.choice(len(pairs), number, replace=False):
        a, b = (names.index(name) for name in pairs[i])
        order[a], order[b] = order[b], order[a]
    return order


def permuted(
    variables: dict[str, Any], names: Sequence[str], order: Sequence[str]
) -> dict[str, Any]:
    """A network's variables, the blocks' in another order."""
    moves = dict(zip(names, order, strict=True))
    return {
        kind: tree | {name: tree[moves[name]] for name in names if name in tree}
        for kind, tree in variables.items()
    }


def tau(names: Sequence[str], order: Sequence[str]) -> float:
    """Kendall's, of an order with the first one: 1 for the same, -1 for the reverse."""
    return float(scipy.stats.kendalltau(range(len(names)), [names.index(n) for n in order])[0])
