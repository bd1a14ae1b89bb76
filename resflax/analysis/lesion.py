"""What a network loses with a block: ensembles of shallow ones (Veit 2016, arXiv 1605.06431)."""

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence

import scipy.stats
from matplotlib.figure import Figure

from resflax import figures
from resflax.analysis import arguments, gates, lesions, lines
from resflax.analysis.lesions import Lesion
from resflax.analysis.result import NothingError, Result
from resflax.analysis.subject import Subject

_PIXELS = 16 * 224**2  # of a batch
# Multiply-adds of all images, unless the command line says how many: a network of 50 layers is
# evaluated 50 times. But an accuracy is not of fewer images than these.
_BUDGET = 4.4e10
_LEAST = 32


def run(subjects: Sequence[Subject], options: argparse.Namespace) -> Result:
    """Measures each subject on its images.

    Raises:
      NothingError: if one has no residual or plain blocks.
    """
    found: dict[str, list[Lesion]] = {}
    rows, remarks = [], []
    for subject in subjects:
        pixels = subject.image_shape[0] * subject.image_shape[1]
        most = options.images or max(_LEAST, int(_BUDGET / subject.macs))
        batches = list(subject.batches(max(1, _PIXELS // pixels), most))
        number = sum(len(labels) for _, labels in batches)
        try:
            of_one = lesions.measure(
                subject.model, subject.variables, batches, draws=options.draws, seed=options.seed
            )
        except NothingError as error:
            raise NothingError(f"{subject.name} {error}") from error
        found[subject.name] = of_one
        rows += [{"network": subject.name, **dataclasses.asdict(x)} for x in of_one]
        remarks += [f"{subject.name}, {number} images: {s}" for s in verdict(of_one)]
    return Result("lesion", rows, remarks, {"": draw(found)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of this analysis."""
    parser.add_argument(
        "--draws", type=arguments.count, default=3, help="of random blocks and swaps; 3"
    )


def verdict(found: Sequence[Lesion]) -> list[str]:
    """In words: the whole network, the drop by stage, and the part of stochastic depth in it."""
    whole = found[0].top1
    blocks = [x for x in found if x.lesion == "block"]
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
        for number, (name, of_one) in enumerate(found.items()):
            colour = figures.COLOURS[number % len(figures.COLOURS)]
            chosen = [x for x in of_one if x.lesion == kind]
            places = [int(x.what) if x.what.isdigit() else i for i, x in enumerate(chosen, 1)]
            axes.axhline(100 * of_one[0].top1, color=colour, linewidth=0.6, linestyle=":")
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


def _pieces(
    places: Sequence[int], found: Sequence[Lesion]
) -> list[tuple[list[int], list[float], list[float]]]:
    """Places, top-1 and its deviation in percent; of deleted blocks, a piece for each stage."""
    pieces = []
    pairs = zip(places, found, strict=True)

    def stage(pair: tuple[int, Lesion]) -> str:
        return gates.stage(pair[1].what) if pair[1].lesion == "block" else ""

    for _, group in itertools.groupby(pairs, key=stage):
        xs, ys = zip(*group, strict=True)
        pieces.append((list(xs), [100 * y.top1 for y in ys], [100 * y.std for y in ys]))
    return pieces
