"""How strongly each layer responds: the standard deviation of what comes out of its norm.

Deep Residual Learning, arXiv 1512.03385, Section 4.2 and Figure 7: residual nets respond less than
plain ones, and the deeper they are, the less each layer changes the signal.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from resflax.analysis import lines, taps
from resflax.analysis.result import Result
from resflax.analysis.subject import Subject
from resflax.models import layers

_BATCH = 32  # images; of 224 pixels they take a gigabyte


@dataclasses.dataclass(frozen=True)
class Response:
    """What comes out of one layer, over all images, positions and channels.

    Attributes:
      layer: the name of the norm, or of the convolution where a network has no norms.
      mean: of what comes out.
      std: its standard deviation.
    """

    layer: str
    mean: float
    std: float

    @property
    def projection(self) -> bool:
        """Whether the layer is on a shortcut, and not one after another with the others."""
        return "/shortcut/" in self.layer


def measure(
    model: nn.Module, variables: dict[str, Any], batches: Iterable[tuple[jax.Array, jax.Array]]
) -> list[Response]:
    """The responses in evaluation mode, before the nonlinearity and the addition.

    In pre-activation units a norm stands before its convolution, so what is measured there is what
    the convolution after the nonlinearity takes.

    Args:
      model: the network, without loops.
      variables: 'params' and 'batch_stats'.
      batches: normalised images, [N, H, W, C], and their labels, which are not used.

    Returns:
      A row for each norm, or for each convolution if there are no norms, in order of use.
    """
    apply = functools.partial(model.apply, train=False)
    order: list[str] = []
    found: list[dict[str, Any]] = []
    sizes = []
    for images, _ in batches:
        if not order:
            select = _norms
            order = list(taps.shapes(apply, select)(variables, images))
            if not order:
                select = _convolutions
                order = list(taps.shapes(apply, select)(variables, images))
            moments = _moments(taps.recorded(apply, select))
        found.append(jax.device_get(moments(variables, images)))
        sizes.append(len(images))
    return [_response(name, [numbers[name] for numbers in found], sizes) for name in order]


def run(subjects: Sequence[Subject], options: argparse.Namespace) -> Result:
    """Measures each subject on its images."""
    found: dict[str, list[Response]] = {}
    rows, remarks = [], []
    for subject in subjects:
        responses = measure(subject.model, subject.variables, subject.batches(_BATCH))
        found[subject.name] = responses
        rows += [{"network": subject.name, **dataclasses.asdict(r)} for r in responses]
        remarks.append(f"{subject.name}: {verdict(responses)}{_caveat(subject)}")
    return Result("responses", rows, remarks, {"": draw(found)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of this analysis: there are none."""


def verdict(responses: Sequence[Response]) -> str:
    """In words: how strong the responses are, those on shortcuts left out."""
    values = [r.std for r in responses if not r.projection]
    kind = "norm" if "norm" in responses[0].layer.split("/")[-1] else "convolution (no norms)"
    return (
        f"the standard deviation after a {kind} is {np.median(values):.3g} in the middle of "
        f"{len(values)} layers, {min(values):.3g} to {max(values):.3g}"
    )


def draw(found: dict[str, list[Response]]) -> Figure:
    """By layer, and sorted by magnitude (Figure 7); the layers on shortcuts are left out."""
    original = {
        name: [r.std for r in responses if not r.projection] for name, responses in found.items()
    }
    ordered = {name: sorted(values, reverse=True) for name, values in original.items()}
    label = "standard deviation of the response"
    return lines.draw(
        [
            ("layer, from the images to the classifier", label, original),
            ("layer, sorted by magnitude", label, ordered),
        ]
    )


def _caveat(subject: Subject) -> str:
    return "" if subject.trained else "; it is not trained, and these are its initialisation's"


def _norms(module: nn.Module, method: str) -> str | None:
    chosen = layers.is_norm(module) and method == "__call__"
    return "/".join(module.path) if chosen else None


def _convolutions(module: nn.Module, method: str) -> str | None:
    chosen = isinstance(module, layers.Conv) and method == "__call__"
    return "/".join(module.path) if chosen else None


def _moments(recorded: Any) -> Any:
    @jax.jit
    def moments(variables: Any, images: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        _, found = recorded(variables, images)
        outputs = {name: passed.output.astype(jnp.float32) for name, passed in found.items()}
        return {name: (jnp.mean(y), jnp.var(y)) for name, y in outputs.items()}

    return moments


def _response(name: str, moments: Sequence[tuple[Any, Any]], sizes: Sequence[int]) -> Response:
    """Of all batches, of the mean and the variance of each."""
    means, variances = np.asarray(moments, np.float64).T
    mean = float(np.average(means, weights=sizes))
    square = float(np.average(variances + np.square(means - mean), weights=sizes))
    return Response(name, mean, math.sqrt(square))
