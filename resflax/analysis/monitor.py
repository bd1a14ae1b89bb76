"""What is cheap to know of a network while it trains: its signal, its units and its gates."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from resflax.analysis import signal, taps, units
from resflax.data import augmentation
from resflax.data.sources import Dataset

# From the last step, the number of steps in its call, and a function that gives the variables.
Look = Callable[[int, int, Callable[[], dict[str, Any]]], dict[str, float]]

_IMAGES = 32
_OF_SIGNAL = "variance", "gradient", "parameters"


class Monitor:
    """Looks at a network with the same few evaluated images every time; compiled at the first look.

    Args:
      model: the network.
      dataset: of the images.
    """

    def __init__(self, model: nn.Module, dataset: Dataset):
        model = taps.written_out(model)
        source = dataset.evaluated
        batch = source.test_batch(np.arange(min(_IMAGES, len(source))))
        description = dataset.description
        normalize = augmentation.normalizer(description.mean, description.std)
        self._images = normalize(jnp.asarray(batch["image"]))
        self._labels = jnp.asarray(batch["label"])
        self._signal, self._units = signal.meter(model), units.meter(model)

    def __call__(self, variables: dict[str, Any]) -> dict[str, float]:
        """By such as 'gradient/stage2_block1'; what a block has not, or is not finite, is left out.

        'variance', 'gradient' and 'parameters': see signal.Signal; 'dead', 'zeros', 'saturated':
        shares of the values of its units, see units.Units; 'gates': the share that is closed or
        open.
        """
        numbers: dict[str, float | None] = {}
        for s in self._signal(variables, self._images, self._labels):
            numbers |= {f"{n}/{s.block}": getattr(s, n) for n in _OF_SIGNAL}
        for u in self._units(variables, [(self._images, self._labels)]):
            shares = {"dead": u.dead_share, "zeros": u.zeros, "saturated": u.saturated}
            shares["gates"] = None if u.closed is None or u.open is None else u.closed + u.open
            numbers |= {f"{name}/{u.block}": share for name, share in shares.items()}
        return {k: v for k, v in numbers.items() if v is not None and math.isfinite(v)}


def watcher(every: int, model: nn.Module, dataset: Dataset) -> Look:
    """What a Monitor sees once in so many steps; nothing at the others, or where `every` is 0."""
    monitor = Monitor(model, dataset) if every else None

    def look(step: int, count: int, variables: Callable[[], dict[str, Any]]) -> dict[str, float]:
        if monitor is None or step // every == (step - count) // every:
            return {}
        return monitor(variables())

    return look
