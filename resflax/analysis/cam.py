"""Where in an image the evidence for a class is: class activation maps and Grad-CAM.

Class activation maps: Zhou 2016, arXiv 1512.04150, Section 2; Grad-CAM: Selvaraju 2017, arXiv
1610.02391, Section 3. Both are of the class that the network predicts, or of a chosen one.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from resflax.analysis import class_maps, overlays
from resflax.analysis.class_maps import Maps
from resflax.analysis.result import NothingError, Result
from resflax.analysis.subject import Subject
from resflax.errors import UserError

_BATCH = 8  # images; with their gradients, and twice as large, those of 224 pixels take a gigabyte

# Of the figure.
_SHOWN = 8


def run(subjects: Sequence[Subject], options: argparse.Namespace) -> Result:
    """Maps the images of each subject.

    Raises:
      NothingError: if a network does not end in global average pooling and one dense layer.
      UserError: if there is no such stage or class, or no image of that size can be taken.
    """
    if options.scale <= 0:
        raise UserError(f"--scale {options.scale} must be greater than 0.")
    rows, remarks, drawn = [], [], {}
    stage = options.stage
    for number, subject in enumerate(subjects, 1):
        batches = _resized(subject, options.scale)
        label = _label(options.label, subject)
        try:
            maps = class_maps.measure(subject.model, subject.variables, batches, stage, label)
        except NothingError as error:
            raise NothingError(f"{subject.name} {error}") from error
        numbers = summary(subject, maps)
        rows += [{"network": subject.name, **row} for row in numbers]
        remarks.append(f"{subject.name}: {verdict(maps, subject.labels, stage)}")
        drawn["" if len(subjects) == 1 else str(number)] = _figure(subject, maps, stage)
    return Result("cam", rows, remarks, drawn)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of this analysis."""
    parser.add_argument(
        "--stage", help="of Grad-CAM, such as stage4; default: the map that is averaged"
    )
    parser.add_argument(
        "--label", help="class, by name or number, whose maps to show; default: the predicted"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of the images' sides, before the network; 1"
    )


def summary(subject: Subject, maps: Maps) -> list[dict[str, Any]]:
    """A row for each image.

    Returns:
      'image' (its number), 'label', 'predicted', 'class' whose maps they are, its 'probability' and
      'logit', 'mean' of its class activation map, which is the logit, and 'row' and 'column' of the
      image's pixel where the map is greatest.
    """
    names = subject.description.label_names
    logits = _mapped(maps)
    top = maps.logits.max(axis=1)
    total = np.exp(maps.logits - top[:, None]).sum(axis=1)
    probability = np.exp(logits - top) / total
    predicted = maps.logits.argmax(axis=1)
    peaks = _peaks(maps.activation, subject.image_shape)
    return [
        {
            "image": i,
            "label": names[label],
            "predicted": names[predicted[i]],
            "class": names[maps.classes[i]],
            "probability": float(probability[i]),
            "logit": float(logits[i]),
            "mean": float(maps.activation[i].mean(dtype=np.float64)),
            "row": int(peaks[i, 0]),
            "column": int(peaks[i, 1]),
        }
        for i, label in enumerate(subject.labels)
    ]


def verdict(maps: Maps, labels: np.ndarray, stage: str | None) -> str:
    """In words: the sizes of the maps, and that they are what they are said to be."""
    difference = np.abs(maps.activation.mean(axis=(1, 2)) - _mapped(maps)).max()
    height, width = maps.activation.shape[1:]
    rows, columns = maps.gradient.shape[1:]
    hits = int((maps.logits.argmax(axis=1) == labels).sum())
    return (
        f"{hits} of {len(labels)} right; class activation maps of {height} x {width} positions, "
        f"whose means differ from the logits by at most {difference:.1e}; Grad-CAM of {rows} x "
        f"{columns}{f', at {stage}' if stage else ', of the same map'}"
    )


def _label(text: str | None, subject: Subject) -> int | None:
    """The number of the class that is asked for."""
    names = subject.description.label_names
    if text is None:
        return None
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    raise UserError(f"--label {text!r} is not one of {', '.join(names)}, nor its number from 0 on.")


def _mapped(maps: Maps) -> np.ndarray:
    """The logits of the classes whose maps they are, [N]."""
    return np.take_along_axis(maps.logits, maps.classes[:, None], axis=1)[:, 0]


def _resized(subject: Subject, scale: float) -> Iterator[tuple[jax.Array, jax.Array]]:
    height, width, _ = subject.image_shape
    sides = max(1, round(scale * height)), max(1, round(scale * width))
    for images, labels in subject.batches(_BATCH):
        shape = images.shape[0], *sides, images.shape[-1]
        yield jax.image.resize(images, shape, "bilinear"), labels


def _peaks(maps: np.ndarray, image_shape: Sequence[int]) -> np.ndarray:
    """The pixels at the centres of the greatest positions, [N, 2]."""
    shape = maps.shape[1:]
    places = np.unravel_index(maps.reshape(len(maps), -1).argmax(axis=1), shape)
    centres = [(p + 0.5) * n / k for p, n, k in zip(places, image_shape, shape, strict=False)]
    return np.stack(centres, axis=-1).astype(int)


def _figure(subject: Subject, maps: Maps, stage: str | None) -> Figure:
    titles = []
    for row in summary(subject, maps)[:_SHOWN]:
        mark = "predicted" if row["predicted"] == row["label"] else "taken for"
        said = f"{row['label']}, {mark} {row['predicted']}"
        of = "" if row["class"] == row["predicted"] else f"; {row['class']}"
        titles.append(f"{said}{of}: {row['probability']:.1%}")
    return overlays.draw(
        subject.images[:_SHOWN],
        {
            "class activation map": maps.activation,
            f"Grad-CAM{f', {stage}' * bool(stage)}": maps.gradient,
        },
        titles,
    )
