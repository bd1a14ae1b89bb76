"""The loss around a network's parameters, along random directions (Li 2018, arXiv 1712.09913).

Each filter of a direction has the norm of the network's filter (Section 4), so that landscapes of
networks whose filters differ in scale can be compared. Biases and norms stay as they are.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure

from resflax import figures, metrics
from resflax.analysis.result import Result
from resflax.analysis.subject import Subject

# Multiply-adds of all images at all points, unless the command line says how many images: half a
# minute on a laptop. But fewer than so many images say nothing.
_BUDGET = 1e12
_LEAST = 4

_LEVELS = 12


@dataclasses.dataclass(frozen=True)
class Point:
    """The loss at parameters + a * first direction + b * second direction, in nats."""

    a: float
    b: float
    loss: float


def direction(params: Any, seed: int) -> Any:
    """A random direction whose filters have the norms of the network's; zero for vectors.

    A filter is what gives one channel of a kernel's output, its last axis.
    """
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def one(key: jax.Array, kernel: jax.Array) -> jax.Array:
        if kernel.ndim < 2:
            return jnp.zeros_like(kernel)
        d = jax.random.normal(key, kernel.shape, kernel.dtype)
        axes = tuple(range(kernel.ndim - 1))
        norms = [jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True)) for x in (kernel, d)]
        return d * (norms[0] / norms[1])

    return jax.tree.unflatten(tree, list(map(one, keys, leaves)))


def measure(
    model: nn.Module,
    variables: dict[str, Any],
    images: jax.Array,
    labels: jax.Array,
    places: Sequence[tuple[float, float]],
    *,
    seed: int = 0,
) -> list[Point]:
    """The mean loss of the same images at many points, in evaluation mode.

    Args:
      model: the network.
      variables: 'params' and 'batch_stats'.
      images: normalised, [N, H, W, C].
      labels: [N].
      places: a and b of each point.
      seed: of the two directions.
    """
    directions = [direction(variables["params"], 2 * seed + i) for i in (0, 1)]
    losses = _losses(model)(variables, directions, images, labels, jnp.asarray(places))
    points = zip(places, np.asarray(losses, np.float64), strict=True)
    return [Point(a, b, float(loss)) for (a, b), loss in points]


def run(subjects: Sequence[Subject], options: argparse.Namespace) -> Result:
    """Measures each subject: along one direction, and, where it is asked for, over two."""
    lines: dict[str, list[Point]] = {}
    planes: dict[str, list[Point]] = {}
    rows, remarks = [], []
    line = [(a, 0.0) for a in _steps(options.points)]
    plane = [(a, b) for b in _steps(options.grid) for a in _steps(options.grid)]
    for subject in subjects:
        images, labels = _batch(subject, len(line) + len(plane), options.images)
        at = functools.partial(
            measure, subject.model, subject.variables, images, labels, seed=options.seed
        )
        points = at([*line, *plane])
        lines[subject.name], planes[subject.name] = points[: len(line)], points[len(line) :]
        rows += [{"network": subject.name, **dataclasses.asdict(p)} for p in points]
        remarks.append(f"{subject.name}, {len(images)} images: {verdict(lines[subject.name])}")
    drawn = {"": draw(lines)} | ({"plane": draw_planes(planes)} if plane else {})
    return Result("landscape", rows, remarks, drawn, columns=())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of this analysis."""
    parser.add_argument("--points", type=_odd, default=31, help="along one direction; 31")
    parser.add_argument(
        "--grid", type=_odd_or_none, default=11, help="points a side; 0: no plane; 11"
    )


def verdict(line: Sequence[Point]) -> str:
    """In words: the loss in the middle, and how far from there it is twice as large."""
    middle = min(line, key=lambda p: abs(p.a))
    far = [abs(p.a) for p in line if not p.loss < 2 * middle.loss]
    reach = f"twice that at a distance of {min(far):.2f}" if far else "nowhere twice that"
    return f"loss {middle.loss:.3g} nats, {reach}"


def draw(lines: Mapping[str, Sequence[Point]]) -> Figure:
    """The loss along the first direction, a line for each network."""
    figure = Figure(figsize=(figures.COLUMN, 2.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(lines.items()):
        places, losses = [p.a for p in points], [p.loss for p in points]
        colour = figures.COLOURS[number % len(figures.COLOURS)]
        axes.plot(places, losses, color=colour, linewidth=1.2, label=name)
    axes.set_xlabel("distance along the direction")
    axes.set_ylabel("loss (nats)")
    figures.style(axes)
    figures.logarithmic(axes)
    figure.legend(loc="outside upper center", frameon=False, fontsize=figures.FONT - 1)
    return figure


def draw_planes(planes: Mapping[str, Sequence[Point]]) -> Figure:
    """Contours of the loss over both directions, a panel for each network, on one scale."""
    columns = min(3, len(planes))
    rows = -(-len(planes) // columns)
    # Panels are square: a wider figure would have its room beside them.
    width = figures.COLUMN if columns == 1 else figures.PAGE
    figure = Figure(figsize=(width, 2.5 * rows + 0.3), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    losses = [p.loss for points in planes.values() for p in points if math.isfinite(p.loss)]
    low, high = np.log10(max(min(losses, default=1.0), 1e-6)), np.log10(max([*losses, 1e-5]))
    levels = np.logspace(low, max(high, low + 0.1), _LEVELS)
    for axes, (name, points) in zip(panels, planes.items(), strict=False):
        side = math.isqrt(len(points))
        a, b, loss = (
            np.array([getattr(p, field) for p in points]).reshape(side, side)
            for field in ("a", "b", "loss")
        )
        clipped = np.clip(np.nan_to_num(loss, nan=levels[-1]), levels[0], levels[-1])
        colours = axes.contourf(a, b, np.log10(clipped), np.log10(levels), cmap="cividis")
        axes.plot(0, 0, "+", color="white", markersize=6)
        axes.set_title(name, fontsize=figures.FONT)
        axes.set_xlabel("first direction")
        axes.set_ylabel("second direction")
        figures.style(axes)
        axes.set_aspect("equal")
    for axes in panels[len(planes) :]:
        axes.set_visible(False)
    bar = figure.colorbar(colours, ax=panels.tolist(), ticks=np.log10(levels[::3]), shrink=0.9)
    shown = functools.partial(np.format_float_positional, precision=2, fractional=False, trim="-")
    bar.ax.set_yticklabels(list(map(shown, levels[::3])))
    bar.ax.tick_params(labelsize=figures.FONT - 1)
    bar.set_label("loss (nats)", fontsize=figures.FONT)
    return figure


def _losses(model: nn.Module) -> Callable[..., jax.Array]:
    @jax.jit
    def losses(
        variables: Any, directions: Any, images: jax.Array, labels: jax.Array, places: jax.Array
    ) -> jax.Array:
        def loss(place: jax.Array) -> jax.Array:
            params = jax.tree.map(
                lambda w, d, e: w + place[0] * d + place[1] * e, variables["params"], *directions
            )
            logits: Any = model.apply({**variables, "params": params}, images, train=False)
            return jnp.mean(metrics.cross_entropy(logits, labels))

        # One after another: as much memory as one.
        return lax.map(loss, places)

    return losses


def _steps(number: int) -> list[float]:
    return np.linspace(-1.0, 1.0, number).tolist() if number > 1 else [0.0] * number


def _batch(subject: Subject, points: int, images: int | None) -> tuple[jax.Array, jax.Array]:
    """So many images, or as many as the budget has for the points, drawn evenly; their labels."""
    number = images or max(_LEAST, int(_BUDGET / (subject.macs * points)))
    return next(subject.batches(number, number))


def _odd(text: str) -> int:
    """A number of points that has one in the middle."""
    number = int(text)
    if number < 3 or number % 2 == 0:
        raise argparse.ArgumentTypeError(f"{number} must be odd and at least 3.")
    return number


def _odd_or_none(text: str) -> int:
    return 0 if text == "0" else _odd(text)
