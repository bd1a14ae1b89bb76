"""The gates of a network over many images, read and replaced: of squeeze-excite, for example.

They are those of the modules of the class models.gates.Gate: see SE, arXiv 1709.01507.
"""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resflax import metrics
from resflax.analysis import taps
from resflax.models.gates import Gate

# Of 0 and of 1: what is nearer is closed or open.
NEAR = 0.01

Batches = Iterable[tuple[jax.Array, jax.Array]]


class Gates(NamedTuple):
    """The gates of one block.

    Attributes:
      classes: means over the images of each class, [K, C]; NaN where a class has no image.
      mean, std: of each channel over all images, [C].
      closed, open: shares of the values below 0.01 and above 0.99, signs aside.
    """

    classes: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    closed: float
    open: float


def measure(
    model: nn.Module, variables: dict[str, Any], batches: Batches, num_classes: int
) -> dict[str, Gates]:
    """The gates of each block in evaluation mode; where they stand at every position, their means.

    Args:
      model: the network, without loops.
      variables: 'params' and 'batch_stats'.
      batches: normalised images, [N, H, W, C], and their labels, [N].
      num_classes: K.

    Returns:
      By the name of the block, in order of use; nothing if there are no gates.
    """
    apply = functools.partial(model.apply, train=False)
    order: list[str] | None = None
    sums: Any = None
    for images, labels in batches:
        if order is None:
            order = list(taps.shapes(apply, select)(variables, images))
            add = _sums(taps.recorded(apply, select), num_classes)
        new = jax.tree.map(np.float64, jax.device_get(add(variables, images, labels)))
        sums = new if sums is None else jax.tree.map(np.add, sums, new)
    return {name: _gates(sums[0], *sums[1][name]) for name in order or ()}


def accuracies(
    model: nn.Module, variables: dict[str, Any], batches: Batches, gates: dict[str, Gates]
) -> dict[str, float]:
    """Top-1 with the gates of a stage replaced by their means over the images.

    Args:
      model: the network, without loops.
      variables: 'params' and 'batch_stats'.
      batches: normalised images, [N, H, W, C], and their labels, [N].
      gates: what was measured.

    Returns:
      By the name of the stage whose gates are replaced; 'none' and 'all' likewise.
    """
    stages = list(dict.fromkeys(map(stage, gates)))
    cases = {"none": [], **{name: [name] for name in stages}, "all": stages}
    means = {name: jnp.asarray(g.mean, jnp.float32) for name, g in gates.items()}
    count = _hits(functools.partial(model.apply, train=False), means)
    hits = dict.fromkeys(cases, 0.0)
    total = 0
    for images, labels in batches:
        total += len(labels)
        for case, replaced in cases.items():
            chosen = {name: jnp.asarray(name in replaced) for name in stages}
            hits[case] += float(count(variables, images, labels, chosen))
    return {case: number / total for case, number in hits.items()}


def select(module: nn.Module, method: str) -> str | None:
    """Selects the gates, by the names of their blocks, or their own where a block has several."""
    if not isinstance(module, Gate) or method != "gates":
        return None
    return "/".join(module.path).removesuffix(f"/{module.label}")


def stage(block: str) -> str:
    """The stage of a block: 'stage3' of 'stage3_block2', 'mixed_5' of 'mixed_5b'."""
    found = re.match(r"(?:stage|block)\d+|\w+_\d+|\w+_[a-z]", block)
    return found[0] if found else block


def _sums(recorded: Callable[..., Any], num_classes: int) -> Callable[..., Any]:
    """From images to the number of each class, and of each block what `_gates` divides by it."""

    @jax.jit
    def add(variables: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        _, found = recorded(variables, images)
        sums = {}
        for name, passed in found.items():
            y = passed.output
            places = tuple(range(1, y.ndim - 1))
            closed, opened = (
                jnp.sum(jnp.mean(is_so, places))
                for is_so in (jnp.abs(y) < NEAR, jnp.abs(y) > 1 - NEAR)
            )
            y = jnp.mean(y, places)
            of_classes = jax.ops.segment_sum(y, labels, num_classes)
            sums[name] = of_classes, jnp.sum(jnp.square(y), axis=0), closed, opened
        return jnp.bincount(labels, length=num_classes), sums

    return add


def _gates(
    counts: np.ndarray, classes: np.ndarray, squares: np.ndarray, closed: float, opened: float
) -> Gates:
    total = counts.sum()
    mean = classes.sum(axis=0) / total
    variance = np.maximum(squares / total - np.square(mean), 0.0)
    number = np.where(counts, counts, np.nan)[:, None]
    values = total * len(mean)
    return Gates(
        classes / number, mean, np.sqrt(variance), float(closed / values), float(opened / values)
    )


def _hits(apply: Callable[..., Any], means: dict[str, jax.Array]) -> Callable[..., jax.Array]:
    """The number of right answers where the gates of chosen stages are replaced, compiled once."""

    @jax.jit
    def count(
        variables: Any, images: jax.Array, labels: jax.Array, chosen: dict[str, jax.Array]
    ) -> jax.Array:
        def replace(name: str, method: Callable[..., Any], *arguments: Any) -> jax.Array:
            gates = method(*arguments)
            mean = jnp.broadcast_to(means[name], gates.shape)
            return jnp.where(chosen[stage(name)], mean, gates)

        logits = taps.edited(apply, select, replace)(variables, images)
        return jnp.sum(metrics.in_top_k(logits, labels, 1))

    return count
