"""What a network loses with a block: residual networks as ensembles (Veit 2016, arXiv 1605.06431).

Deleting a residual block leaves its shortcut. Deleting a block of a plain network leaves its input,
subsampled and with channels of zeros where the block changes the shape (option A).
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from resflax import figures, metrics
from resflax.analysis import gates, lines, order, taps
from resflax.analysis.result import NothingError, Result
from resflax.analysis.subject import Subject
from resflax.models import residual
from resflax.ops.norm import Affine

_PIXELS = 16 * 224**2  # of a batch
# Of all images, unless the command line says: a network of 50 layers is evaluated 50 times.
_MOST_PIXELS = 2 * _PIXELS
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
            "lesion is for networks of residual blocks as in ResNet, with or without shortcuts, "
            "such as cifar_resnet20, resnet50 and se_resnext50_32x4d."
        )
    top1 = functools.partial(_top1, _hits(model), batches, names)
    rng = np.random.default_rng(seed)
    whole = top1(variables, ())
    found = [Lesion("none", "nothing", whole)]
    rates = _drop_rates(model, names)
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
            identity = residual.zero_padded_identity(x[..., : y.shape[-1]], y.shape[-1], stride)
            return jnp.where(kept[name] > 0, y, identity)

        plain = taps.edited(apply, _plain_blocks, bypassed)
        return taps.edited(plain, _branches, scaled)(variables, images)

    return logits


def run(subjects: Sequence[Subject], options: argparse.Namespace) -> Result:
    """Measures each subject on its images.

    Raises:
      NothingError: see `measure`.
    """
    found: dict[str, list[Lesion]] = {}
    rows, remarks = [], []
    for subject in subjects:
        pixels = subject.image_shape[0] * subject.image_shape[1]
        most = None if options.images else max(1, _MOST_PIXELS // pixels)
        batches = list(subject.batches(max(1, _PIXELS // pixels), most))
        number = sum(len(labels) for _, labels in batches)
        lesions = measure(
            subject.model, subject.variables, batches, draws=options.draws, seed=options.seed
        )
        found[subject.name] = lesions
        rows += [{"network": subject.name, **dataclasses.asdict(x)} for x in lesions]
        remarks += [f"{subject.name}, {number} images: {s}" for s in verdict(lesions)]
    return Result("lesion", rows, remarks, {"": draw(found)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of this analysis."""
    parser.add_argument("--draws", type=_count, default=3, help="of random blocks and swaps; 3")


def verdict(lesions: Sequence[Lesion]) -> list[str]:
    """In words: the whole network, the drop by stage, and the part of stochastic depth in it."""
    whole = lesions[0].top1
    blocks = [x for x in lesions if x.lesion == "block"]
    worst = max(blocks, key=lambda x: whole - x.top1)
    stages = {
        stage: statistics.fmean(whole - x.top1 for x in group)
        for stage, group in itertools.groupby(blocks, key=lambda x: gates.stage(x.what))
    }
    drops = ", ".join(f"{stage} {100 * drop:.1f}" for stage, drop in stages.items())
    said = [
        f"top-1 {whole:.1%}; without one block it drops by {drops} points on average; most "
        f"without {worst.what}, to {worst.top1:.1%}"
    ]
    rates = [x.drop_rate for x in blocks if x.drop_rate is not None]
    # Ranks of equal numbers have no correlation.
    if len(rates) == len(blocks) and len({x.top1 for x in blocks}) > 1 < len(set(rates)):
        rho = scipy.stats.spearmanr(rates, [whole - x.top1 for x in blocks]).statistic
        said.append(
            "the more often stochastic depth drops a block, the "
            f"{'less' if rho < 0 else 'more'} it is missed: rank correlation {rho:.2f}"
        )
    return said


def draw(found: Mapping[str, Sequence[Lesion]]) -> Figure:
    """Top-1 by the deleted block, by the number of deleted blocks, and of swaps."""
    figure = Figure(figsize=(figures.PAGE, 2.9), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    labels = {
        "block": "deleted block, from the images on",
        "blocks": "blocks deleted at random",
        "swaps": "swaps of equal blocks",
    }
    for axes, (kind, label) in zip(panels, labels.items(), strict=True):
        for number, (name, lesions) in enumerate(found.items()):
            colour = figures.COLOURS[number % len(figures.COLOURS)]
            chosen = [x for x in lesions if x.lesion == kind]
            places = [int(x.what) if x.what.isdigit() else i for i, x in enumerate(chosen, 1)]
            axes.axhline(100 * lesions[0].top1, color=colour, linewidth=0.6, linestyle=":")
            for piece, (x, y, error) in enumerate(_pieces(places, chosen)):
                axes.errorbar(
                    x, y, error, fmt=".-", color=colour, linewidth=1.0, markersize=4,
                    label=None if piece else name, elinewidth=0.6,
                )  # fmt: skip
        axes.set_xlabel(label)
        figures.style(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("top-1 accuracy, %")
    panels[0].set_ylim(0, 103)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=lines.legend_columns(list(found)),
        frameon=False,
        fontsize=figures.FONT - 1,
        title="dotted: the whole network; lines join the blocks of a stage",
        title_fontsize=figures.FONT - 1,
    )
    return figure


def _branches(module: nn.Module, method: str) -> str | None:
    """Selects the branches of residual blocks."""
    chosen = isinstance(module, residual.ResidualBlock) and module.shortcut != "none"
    return "/".join(module.path) if chosen and method == "_branch" else None


def _plain_blocks(module: nn.Module, method: str) -> str | None:
    """Selects blocks without a shortcut."""
    chosen = isinstance(module, residual.ResidualBlock) and module.shortcut == "none"
    return "/".join(module.path) if chosen and method == "__call__" else None


def _blocks(model: nn.Module, variables: dict[str, Any], images: jax.Array) -> list[str]:
    def either(module: nn.Module, method: str) -> str | None:
        return _branches(module, method) or _plain_blocks(module, method)

    apply = functools.partial(model.apply, train=False)
    return list(taps.shapes(apply, either, variables, images))


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


def _drop_rates(model: nn.Module, names: Sequence[str]) -> dict[str, float]:
    """By the names of the blocks, such as 'stage2_block1'; nothing without stochastic depth."""
    if not getattr(model, "drop_path", 0.0):
        return {}
    places = {n: n.removeprefix("stage").split("_block") for n in names}
    return {n: model.drop_rate(int(stage), int(block)) for n, (stage, block) in places.items()}


def _pieces(
    places: Sequence[int], lesions: Sequence[Lesion]
) -> list[tuple[list[int], list[float], list[float]]]:
    """Places, top-1 and its deviation in percent; of deleted blocks, a piece for each stage."""
    pieces = []
    pairs = zip(places, lesions, strict=True)

    def stage(pair: tuple[int, Lesion]) -> str:
        return gates.stage(pair[1].what) if pair[1].lesion == "block" else ""

    for _, group in itertools.groupby(pairs, key=stage):
        xs, found = zip(*group, strict=True)
        pieces.append((list(xs), [100 * x.top1 for x in found], [100 * x.std for x in found]))
    return pieces


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1.")
    return number


def _numbers(most: int) -> list[int]:
    """Up to six numbers of things, from 1 to all but one of them."""
    last = max(1, most - 1)
    return sorted({round(x) for x in np.linspace(1, last, _NUMBERS)}) if most else []


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
