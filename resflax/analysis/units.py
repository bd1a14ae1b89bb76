"""Units that are of no use: ReLUs that never fire, sigmoids and gates at their ends.

A unit is a channel. See resflax.analysis.arrivals for where it is looked at.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from resflax.analysis import arrivals, channels, lines, taps
from resflax.analysis.channels import RANGES, Channels
from resflax.analysis.result import NothingError, Result
from resflax.analysis.subject import Subject
from resflax.models.constructors import title

_BATCH = 32  # images; of 224 pixels they take a gigabyte


@dataclasses.dataclass(frozen=True)
class Units:
    """The units of one block, and its gates; None: the block has none of that kind.

    Attributes:
      block: its name.
      units: channels that an activation gives out.
      dead: ReLU: of them, those that are zero at every position of every image.
      zeros: ReLU: share of their values that are zero.
      saturated: sigmoid and tanh: share of their values within 0.01 of an asymptote.
      gates: channels that squeeze-excite or a shortcut's gate scales.
      closed: share of the gates' values below 0.01, signs aside.
      open: likewise, above 0.99.
    """

    block: str
    units: int
    dead: int | None
    zeros: float | None
    saturated: float | None
    gates: int
    closed: float | None
    open: float | None

    @property
    def dead_share(self) -> float | None:
        """The dead ones, as a share of all units of the block."""
        return None if self.dead is None or not self.units else self.dead / self.units


def meter(
    model: nn.Module,
) -> Callable[[dict[str, Any], Iterable[tuple[jax.Array, jax.Array]]], list[Units]]:
    """What counts the units of each block in evaluation mode.

    Where a block's output is not yet activated, what the next takes in belongs to it: of the last
    one, means over the positions. Units that a block's convolutions read through a pool count in
    it, too (Inception).

    Args:
      model: the network, without loops.

    Returns:
      From 'params' and 'batch_stats' and batches, of normalised images [N, H, W, C] and labels,
      which are not used, to a row for each block with units or gates, in order of use; compiled
      once for images of one shape.
    """
    apply = functools.partial(model.apply, train=False)
    act = activation(model)
    shapes = taps.shapes(apply, arrivals.select)

    @functools.cache
    def counter(blocks: tuple[str, ...]) -> Callable[..., Any]:
        return _counted(taps.recorded(apply, arrivals.select), blocks, act)

    def measure(
        variables: dict[str, Any], batches: Iterable[tuple[jax.Array, jax.Array]]
    ) -> list[Units]:
        blocks: list[str] = []
        found, sizes = [], []
        for images, _ in batches:
            if not blocks:
                order = shapes(variables, images)
                blocks = arrivals.blocks(list(order), variables["params"])
            count = counter(tuple(blocks))
            found.append(jax.device_get(count(variables, images)))
            sizes.append(len(images))
        join = functools.partial(channels.joined, sizes)
        places = jax.tree.map(join, *found, is_leaf=lambda x: isinstance(x, Channels))
        rows = [_units(b, places[b]["units"], places[b]["gates"], act) for b in blocks]
        return [row for row in rows if row.units or row.gates]

    return measure


def activation(model: nn.Module) -> Any:
    """A network's activation, a name or a function; those that have no choice of it have ReLUs."""
    return getattr(model, "act", "relu")


def run(subjects: Sequence[Subject], options: argparse.Namespace) -> Result:
    """Counts the units of each subject on its images.

    Raises:
      NothingError: if a network has neither activations that die or saturate, nor gates.
    """
    found: dict[str, list[Units]] = {}
    rows, remarks = [], []
    for subject in subjects:
        counted = meter(subject.model)(subject.variables, subject.batches(_BATCH))
        if not counted:
            raise NothingError(
                f"{subject.name} has the activation {title(activation(subject.model))}, which "
                "neither dies nor saturates, and no gates; act relu, sigmoid and tanh do, and the "
                "networks se_* have gates."
            )
        found[subject.name] = counted
        rows += [{"network": subject.name, **dataclasses.asdict(u)} for u in counted]
        remarks.append(f"{subject.name}, {len(subject.images)} images: {verdict(counted)}")
    empty = {c for c in rows[0] if all(row[c] is None for row in rows)}
    rows = [{c: value for c, value in row.items() if c not in empty} for row in rows]
    return Result("units", rows, remarks, {"": draw(found)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of this analysis: there are none."""


def verdict(counted: Sequence[Units]) -> str:
    """In words: the units of all blocks together, and the block where most are dead."""
    parts = []
    if any(u.dead is not None for u in counted):
        number, dead = (sum(getattr(u, f) or 0 for u in counted) for f in ("units", "dead"))
        worst = max(counted, key=lambda u: (u.dead or 0) / max(u.units, 1))
        most = f", most in {worst.block} ({worst.dead} of {worst.units})" if dead else ""
        parts.append(f"{dead} of {number} ReLUs are dead{most}")
        parts.append(f"{_total(counted, 'zeros', 'units'):.1%} of their values are zero")
    elif any(u.units for u in counted):
        parts.append(f"{_total(counted, 'saturated', 'units'):.1%} of the values are saturated")
    if any(u.gates for u in counted):
        closed, opened = (_total(counted, field, "gates") for field in ("closed", "open"))
        parts.append(f"{closed:.1%} of the gates are closed, {opened:.1%} open")
    return "; ".join(parts)


def draw(found: dict[str, list[Units]]) -> Figure:
    """Each share over the blocks, a panel each, a line for each network."""
    shares: dict[str, Callable[[Units], float | None]] = {
        "dead units, %": lambda u: u.dead_share,
        "zeros, %": lambda u: u.zeros,
        "values near an asymptote, %": lambda u: u.saturated,
        "gates below 0.01 or above 0.99, %": lambda u: (
            None if u.closed is None or u.open is None else u.closed + u.open
        ),
    }
    panels = []
    for label, share in shares.items():
        values = {name: [share(u) for u in counted] for name, counted in found.items()}
        kept = {
            name: [math.nan if v is None else 100 * v for v in line]
            for name, line in values.items()
            if any(v is not None for v in line)
        }
        if kept:
            panels.append(("block, from the images on", label, kept))
    return lines.draw(panels)


def _total(counted: Sequence[Units], field: str, number: str) -> float:
    """The mean of a share, each block weighted by its number of units or gates."""
    kept = [u for u in counted if getattr(u, field) is not None]
    weights = [getattr(u, number) for u in kept]
    return float(np.average([getattr(u, field) for u in kept], weights=weights))


def _counted(recorded: Callable[..., Any], blocks: Sequence[str], act: str) -> Callable[..., Any]:
    """From images to {block: {'units' and 'gates': {place: its channels}}}, compiled."""

    @jax.jit
    def count(variables: Any, images: jax.Array) -> dict[str, dict[str, dict[str, Channels]]]:
        _, found = recorded(variables, images)
        units = arrivals.activations(found, blocks) if act in RANGES else {}
        counts = {}
        for block in blocks:
            gates = arrivals.gates(found, block)
            counts[block] = {
                "units": {p: channels.counted(x, act) for p, x in units.get(block, {}).items()},
                "gates": {p: channels.counted(jnp.abs(x), "sigmoid") for p, x in gates.items()},
            }
        return counts

    return count


def _units(block: str, places: dict[str, Channels], gates: dict[str, Channels], act: str) -> Units:
    bottom, top = RANGES.get(act, (0.0, 0.0))
    activated = {
        place: c
        for place, c in places.items()
        if np.min(c.least) >= bottom and np.max(c.greatest) <= top
    }
    if "output" in activated:
        activated.pop("after", None)
    units = channels.concatenated(list(activated.values()))
    scales = channels.concatenated(list(gates.values()))
    dead = zeros = saturated = closed = opened = None
    if units is not None and math.isfinite(top):
        saturated = float(np.mean(units.low + units.high))
    elif units is not None:
        dead, zeros = int(np.sum(units.greatest == 0)), float(np.mean(units.zeros))
    if scales is not None:
        closed, opened = float(np.mean(scales.low)), float(np.mean(scales.high))
    number, gated = (0 if c is None else len(c.zeros) for c in (units, scales))
    return Units(block, number, dead, zeros, saturated, gated, closed, opened)
