"""A network's accuracy without some of its blocks: see resflax.analysis.lesion.

Deleting a residual block leaves its shortcut. Deleting a block of a plain network leaves its input,
subsampled and with channels of zeros where the block changes the shape (option A).
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resflax import metrics
from resflax.analysis import order, taps
from resflax.analysis.result import NothingError
from resflax.models import residual
from resflax.models.shortcuts import zero_padded_identity
from resflax.ops.norm import Affine

_NUMBERS = 6  # of blocks that are deleted, or swapped, at a time


@dataclasses.dataclass(frozen=True)
class Lesion:
    """What was done to a network, and its accuracy on the same images.

    Attributes:
      lesion: 'none', 'block' (one is deleted), 'blocks' (so many, at random), 'swaps' (so many
        times, at random, two blocks of one shape change their places).
      what: the block, or how many.
      top1: mean over the draws, a share.
      std: over the draws; 0 of one.
      drop_rate: with which the block is dropped in training, if stochastic depth does.
      tau: Kendall's, of the order of the blocks after the swaps with that before.
    """

    lesion: str
    what: str
    top1: float
    std: float = 0.0
    drop_rate: float | None = None
    tau: float | None = None


def measure(
    model: nn.Module,
    variables: dict[str, Any],
    batches: Sequence[tuple[jax.Array, jax.Array]],
    *,
    draws: int = 3,
    seed: int = 0,
) -> list[Lesion]:
    """The accuracies in evaluation mode, of the whole network first.

    Args:
      model: the network, without loops.
      variables: 'params' and 'batch_stats'.
      batches: normalised images [N, H, W, C] and labels [N]; those of one shape compile once.
      draws: of the blocks that are deleted or swapped at random.
      seed: of these.

    Raises:
      NothingError: if it has no residual or plain blocks.
    """
    names = _blocks(model, variables, batches[0][0])
    if not names:
        raise NothingError(
            "has no residual blocks as in ResNet, with or without shortcuts; cifar_resnet20, "
            "resnet50 and se_resnext50_32x4d have."
        )
    top1 = functools.partial(_top1, _hits(model), batches, names)
    rng = np.random.default_rng(seed)
    whole = top1(variables, ())
    found = [Lesion("none", "nothing", whole)]
    rates = getattr(model, "drop_rates", {})
    for name in names:
        found.append(Lesion("block", name, top1(variables, (name,)), drop_rate=rates.get(name)))
    for number in _numbers(len(names)):
        chosen = [rng.choice(names, number, replace=False).tolist() for _ in range(draws)]
        values = [top1(variables, deleted) for deleted in chosen]
        found.append(Lesion("blocks", str(number), *_spread(values)))
    pairs = list(order.exchangeable(variables["params"], names))
    for number in _numbers(len(pairs)):
        orders = [order.swapped(names, pairs, number, rng) for _ in range(draws)]
        values = [top1(order.permuted(variables, names, o), ()) for o in orders]
        taus = [order.tau(names, o) for o in orders]
        spread = _spread(values)
        found.append(Lesion("swaps", str(number), *spread, tau=statistics.fmean(taus)))
    return found


def lesioned(model: nn.Module) -> Callable[..., jax.Array]:
    """The network in evaluation mode with blocks that may be deleted.

    Returns:
      From variables, images and, by the name of each block, 1.0 (kept) or 0.0 (deleted), to logits.
    """
    apply = functools.partial(model.apply, train=False)

    def logits(variables: Any, images: jax.Array, kept: Mapping[str, jax.Array]) -> jax.Array:
        def scaled(name: str, method: Callable[..., Any], *arguments: Any) -> Any:
            keep, y = kept[name], method(*arguments)
            if isinstance(y, Affine):
                return y._replace(scale=y.scale * keep, shift=y.shift * keep)
            return y * keep.astype(y.dtype)

        def bypassed(name: str, method: Callable[..., Any], x: jax.Array, *rest: Any) -> jax.Array:
            y = method(x, *rest)
            stride = -(-x.shape[1] // y.shape[1])
            # A plain block may take in more channels than it gives out, behind a wide stem.
            identity = zero_padded_identity(x[..., : y.shape[-1]], y.shape[-1], stride)
            return jnp.where(kept[name] > 0, y, identity)

        plain = taps.edited(apply, _plain_blocks, bypassed)
        return taps.edited(plain, _branches, scaled)(variables, images)

    return logits


def _branches(module: nn.Module, method: str) -> str | None:
    """Selects the branches of residual blocks."""
    chosen = isinstance(module, residual.ResidualBlock) and module.spec.shortcut is not None
    return "/".join(module.path) if chosen and method == "_branch" else None


def _plain_blocks(module: nn.Module, method: str) -> str | None:
    """Selects blocks without a shortcut."""
    chosen = isinstance(module, residual.ResidualBlock) and module.spec.shortcut is None
    return "/".join(module.path) if chosen and method == "__call__" else None


def _blocks(model: nn.Module, variables: dict[str, Any], images: jax.Array) -> list[str]:
    def either(module: nn.Module, method: str) -> str | None:
        return _branches(module, method) or _plain_blocks(module, method)

    apply = functools.partial(model.apply, train=False)
    return list(taps.shapes(apply, either)(variables, images))


def _hits(model: nn.Module) -> Callable[..., jax.Array]:
    logits = lesioned(model)

    @jax.jit
    def hits(variables: Any, images: jax.Array, labels: jax.Array, kept: Any) -> jax.Array:
        return jnp.sum(metrics.in_top_k(logits(variables, images, kept), labels, 1))

    return hits


def _top1(
    hits: Callable[..., jax.Array],
    batches: Sequence[tuple[jax.Array, jax.Array]],
    names: Sequence[str],
    variables: dict[str, Any],
    deleted: Sequence[str],
) -> float:
    kept = {name: jnp.float32(name not in deleted) for name in names}
    counts = [hits(variables, images, labels, kept) for images, labels in batches]
    return float(sum(map(float, counts)) / sum(len(labels) for _, labels in batches))


def _numbers(most: int) -> list[int]:
    """Up to six numbers of things, from 1 to all but one of them."""
    last = max(1, most - 1)
    return sorted({round(x) for x in np.linspace(1, last, _NUMBERS)}) if most else []


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
