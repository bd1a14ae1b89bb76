"""What the gates of squeeze-excite do, by class and by stage, and whether they need the image.

Squeeze-and-Excitation Networks, arXiv 1709.01507, Section 7.2 and Figures 5 to 7. A gate that is
the same for every image scales its channel as the scale of a batch norm could.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resflax import figures
from resflax.analysis import gates
from resflax.analysis.gates import Gates
from resflax.analysis.result import NothingError, Result
from resflax.analysis.subject import Subject

# Standard deviation over the images, below which a gate never moves.
STILL = 0.01

_BATCH = 32  # images; of 224 pixels they take a gigabyte

# Of the figure: lines that can be told apart, their points, and characters of their names.
_CLASSES, _POINTS, _NAME = 5, 64, 14


@dataclasses.dataclass(frozen=True)
class Excitation:
    """The gates of one block in numbers.

    Attributes:
      block: its name.
      stage: of the network.
      channels: how many gates.
      mean: of them all.
      std_channels: standard deviation over the channels, of their means.
      std_images: standard deviation over the images, mean over the channels.
      std_classes: standard deviation over the classes' means, mean over the channels.
      closed, open: see Gates.
      still: share of the channels whose gate never moves: over the images below 0.01.
    """

    block: str
    stage: str
    channels: int
    mean: float
    std_channels: float
    std_images: float
    std_classes: float
    closed: float
    open: float
    still: float


def run(subjects: Sequence[Subject], options: argparse.Namespace) -> Result:
    """Measures each subject on its images, and of the trained ones the accuracy.

    Raises:
      NothingError: if a network has no gates.
    """
    rows, remarks, drawn = [], [], {}
    for number, subject in enumerate(subjects, 1):
        found = _measured(subject)
        numbers = [summary(name, g) for name, g in found.items()]
        right: dict[str, float] = {}
        if subject.trained:
            batches = subject.batches(_BATCH)
            right = gates.accuracies(subject.model, subject.variables, batches, found)
        for row in numbers:
            top1 = {"top1": right.get("none"), "top1_fixed": right.get(row.stage)}
            rows.append({"network": subject.name, **dataclasses.asdict(row), **top1})
        remarks += [f"{subject.name}: {line}" for line in verdict(numbers, right)]
        names = subject.description.label_names
        figure = draw(subject.name, _last_of_stages(found), names)
        drawn["" if len(subjects) == 1 else str(number)] = figure
    if not any(subject.trained for subject in subjects):
        rows = [{k: v for k, v in row.items() if not k.startswith("top1")} for row in rows]
    hidden = ("stage", "channels", "std_channels", "closed", "open", "top1")
    return Result("excitation", rows, remarks, drawn, [c for c in rows[0] if c not in hidden])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of this analysis: there are none."""


def summary(block: str, found: Gates) -> Excitation:
    """The gates of one block in numbers."""
    seen = found.classes[~np.isnan(found.classes).any(axis=1)]
    return Excitation(
        block,
        gates.stage(block),
        len(found.mean),
        mean=float(np.mean(found.mean)),
        std_channels=float(np.std(found.mean)),
        std_images=float(np.mean(found.std)),
        std_classes=float(np.mean(np.std(seen, axis=0))),
        closed=found.closed,
        open=found.open,
        still=float(np.mean(found.std < STILL)),
    )


def verdict(numbers: Sequence[Excitation], right: dict[str, float]) -> list[str]:
    """In words: where the gates depend on the image, and what it is worth."""
    most = max(numbers, key=lambda e: e.std_images)
    total = sum(e.channels for e in numbers)
    still, closed, opened = (
        sum(getattr(e, field) * e.channels for e in numbers) / total
        for field in ("still", "closed", "open")
    )
    lines = [
        f"{still:.1%} of {total} gates never move; {closed:.1%} are closed and {opened:.1%} open; "
        f"they move most in {most.block}, by {most.std_images:.3f}"
    ]
    if right:
        replaced = ", ".join(f"{right[s]:.2%} ({s})" for s in right if s != "none")
        lines.append(f"top-1 {right['none']:.2%}; with the gates at their means: {replaced}")
    return lines


def draw(title: str, blocks: Mapping[str, Gates], label_names: Sequence[str]) -> Figure:
    """A panel for each block, its channels sorted by their mean gate, which is the black line.

    Args:
      title: the network.
      blocks: the gates of each.
      label_names: by class; lines are drawn for at most 5 classes with images, evenly chosen.
    """
    columns = min(2, len(blocks))
    rows = math.ceil(len(blocks) / columns)
    figure = Figure(figsize=(figures.PAGE, 1.9 * rows + 0.5), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes in panels[len(blocks) :]:
        axes.set_axis_off()
    for number, (axes, (name, found)) in enumerate(zip(panels, blocks.items(), strict=False)):
        order, places = _shown(found)
        some = f", {len(places)} of {len(found.mean)}" if len(places) < len(found.mean) else ""
        axes.set_xlabel(f"{name}: channel, by its mean gate{some}")
        axes.set_ylabel("" if number % columns else "gate")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        figures.style(axes)
        for colour, label in zip(figures.COLOURS, _chosen(found), strict=False):
            line = found.classes[label][order]
            text = label_names[label][:_NAME]
            axes.plot(places, line, color=colour, linewidth=0.8, label=text)
        axes.plot(places, found.mean[order], color="black", linewidth=1.2, label="all images")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=_CLASSES + 1,
        frameon=False,
        fontsize=figures.FONT - 1,
        title=title,
        title_fontsize=figures.FONT,
    )
    return figure


def _measured(subject: Subject) -> dict[str, Gates]:
    classes = subject.description.num_classes
    found = gates.measure(subject.model, subject.variables, subject.batches(_BATCH), classes)
    if not found:
        raise NothingError(
            f"{subject.name} has no squeeze-excite gates; the networks se_* and cifar_se_* have, "
            "and others with se_reduction 16."
        )
    return found


def _last_of_stages(found: dict[str, Gates]) -> dict[str, Gates]:
    last = {gates.stage(name): name for name in found}
    return {name: found[name] for name in last.values()}


def _shown(found: Gates) -> tuple[np.ndarray, np.ndarray]:
    """The channels that are drawn, evenly chosen of those sorted by the mean, and their places."""
    places = np.unique(np.linspace(1, len(found.mean), _POINTS).round().astype(int))
    return np.argsort(found.mean)[places - 1], places


def _chosen(found: Gates) -> Sequence[int]:
    """Classes with images, evenly chosen."""
    seen = np.flatnonzero(~np.isnan(found.classes).any(axis=1))
    number = min(_CLASSES, len(seen))
    return [int(seen[i * len(seen) // number]) for i in range(number)]
