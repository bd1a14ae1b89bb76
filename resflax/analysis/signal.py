"""The signal on its way through a network, forward and backward, block by block.

In a residual network the derivative of the loss with respect to a block's input has a term without
any weight layer, that of the shortcut (Identity Mappings, arXiv 1603.05027, Equation 5); in a plain
one it is a product over all layers. What the blocks' parameters get of it is looked at as well,
before or after it is clipped.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from resflax import metrics
from resflax.analysis import arguments, lines, taps
from resflax.analysis.result import Result
from resflax.analysis.subject import Subject

# A change over all blocks beyond which the gradient is said to vanish or to explode.
_MOST = 1e3

# Images that are looked at, unless the command line says; of 224 pixels, 16 take three gigabytes.
_IMAGES = 32
_PIXELS = 16 * 224**2


@dataclasses.dataclass(frozen=True)
class Signal:
    """What passes through one block, means over the images.

    Attributes:
      block: its name.
      mean: of what comes out.
      variance: of what comes out.
      norm: Euclidean, of what comes out of an image.
      gradient: Euclidean norm of the derivative of an image's loss with respect to what goes in.
      parameters: Euclidean norm of the derivative of the mean loss with respect to the block's
        parameters, clipped with those of the whole network; 0 where it has none.
    """

    block: str
    mean: float
    variance: float
    norm: float
    gradient: float
    parameters: float


def meter(model: nn.Module, seed: int = 0) -> Callable[..., list[Signal]]:
    """What measures the signal in training mode: batch norm has the statistics of these images.

    Args:
      model: the network, without loops.
      seed: of dropout and stochastic depth.

    Returns:
      From 'params' and 'batch_stats', normalised images [N, H, W, C], labels [N], and the largest
      global norm of the parameters' gradient (by default there is no limit) to a row for each
      block, in order; compiled once for images of one shape.
    """
    apply = functools.partial(
        model.apply, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(seed)}
    )
    statistics = _statistics(apply)
    shapes = taps.shapes(apply, taps.parts)

    def measure(
        variables: dict[str, Any], images: jax.Array, labels: jax.Array, clip_norm: float = math.inf
    ) -> list[Signal]:
        passed = shapes(variables, images)
        offsets = {name: jnp.zeros(p.input.shape, p.input.dtype) for name, p in passed.items()}
        numbers = jax.device_get(statistics(variables, images, labels, offsets, clip_norm))
        # A jitted function gives dictionaries back in alphabetical order.
        return [Signal(name, *(float(n) for n in numbers[name])) for name in passed]

    return measure


def factor(values: Sequence[float]) -> float:
    """By how much values change from block to block: of a straight line through their logarithms.

    It is 0 where one of them is 0, and NaN where one is not finite.
    """
    if not all(math.isfinite(v) for v in values):
        return math.nan
    if min(values) <= 0:
        return 0.0
    slope = np.polyfit(np.arange(len(values)), np.log(values), 1)[0] if len(values) > 1 else 0.0
    return float(np.exp(slope))


def verdict(signals: Sequence[Signal]) -> str:
    """In words: what becomes of the gradient on its way back, and of what goes forward."""
    backward = factor([s.gradient for s in reversed(signals)])
    forward = factor([s.variance for s in signals])
    parts = [f"gradient {_word(backward, len(signals))}", f"variance x {forward:.3g} a block"]
    return "; ".join(parts)


def run(subjects: Sequence[Subject], options: argparse.Namespace) -> Result:
    """Measures each subject on some of its images, with each limit of the gradient."""
    found: dict[str, list[Signal]] = {}
    clipped: dict[str, list[Signal]] = {}
    rows, remarks = [], []
    for subject in subjects:
        pixels = subject.image_shape[0] * subject.image_shape[1]
        number = options.batch or min(_IMAGES, max(1, _PIXELS // pixels))
        images, labels = next(subject.batches(number, number))
        measure = meter(subject.model)
        for limit in options.clip_norm:
            signals = measure(subject.variables, images, labels, limit)
            name = subject.name if limit == math.inf else f"{subject.name}, clipped to {limit:g}"
            found.setdefault(subject.name, signals)
            clipped[name] = signals
            rows += [{"network": name, **dataclasses.asdict(s)} for s in signals]
        # What is clipped is the parameters' alone.
        remarks.append(f"{subject.name}: {verdict(found[subject.name])}")
    return Result("signal", rows, remarks, {"": draw(found, clipped)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of this analysis."""
    parser.add_argument(
        "--batch", type=arguments.count, help="images that are looked at; 32, fewer of large ones"
    )
    parser.add_argument(
        "--clip-norm",
        type=_limits,
        default=(math.inf,),
        metavar="G[,G...]",
        help="largest norms of the parameters' gradient; inf: it is not clipped",
    )


def draw(found: dict[str, list[Signal]], clipped: dict[str, list[Signal]]) -> Figure:
    """Variance and gradients over the blocks, a line for each network.

    Args:
      found: by network.
      clipped: by network and limit, for the gradient of the parameters.
    """
    return lines.draw(
        [
            (
                "block",
                label,
                {name: [getattr(s, field) for s in signals] for name, signals in of.items()},
            )
            for field, label, of in (
                ("variance", "variance of the block's output", found),
                ("gradient", "norm of the gradient at its input", found),
                ("parameters", "norm of its parameters' gradient", clipped),
            )
        ]
    )


def _statistics(apply: Callable[..., Any]) -> Callable[..., dict[str, tuple[jax.Array, ...]]]:
    @jax.jit
    def statistics(
        variables: Any,
        images: jax.Array,
        labels: jax.Array,
        offsets: dict[str, jax.Array],
        clip_norm: jax.Array,
    ) -> dict[str, tuple[jax.Array, ...]]:
        def loss(
            offsets: dict[str, jax.Array], params: Any
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            outputs = {}

            def shift(name: str, method: Callable[..., Any], x: jax.Array, *rest: Any) -> Any:
                outputs[name] = method(x + offsets[name], *rest)
                return outputs[name]

            logits, _ = taps.edited(apply, taps.parts, shift)(
                {**variables, "params": params}, images
            )
            return jnp.sum(metrics.cross_entropy(logits, labels)), outputs

        derivative = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (gradients, of_params), outputs = derivative(offsets, variables["params"])
        of_params = jax.tree.map(lambda g: g / len(images), of_params)
        kept = jnp.minimum(1.0, clip_norm / optax.tree.norm(of_params))
        numbers: dict[str, tuple[jax.Array, ...]] = {}
        for name, output in outputs.items():
            y = output.astype(jnp.float32)
            of_block = kept * optax.tree.norm(of_params.get(name, ()))
            numbers[name] = jnp.mean(y), jnp.var(y), _norm(y), _norm(gradients[name]), of_block
        return numbers

    return statistics


def _norm(x: jax.Array) -> jax.Array:
    """The mean over the images of their Euclidean norms."""
    rows = x.astype(jnp.float32).reshape(x.shape[0], -1)
    return jnp.mean(jnp.linalg.norm(rows, axis=1))


def _limits(text: str) -> tuple[float, ...]:
    try:
        limits = tuple(map(float, text.split(",")))
    except ValueError:
        limits = ()
    if not limits or not min(limits) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be positive numbers, such as 0.1,1,inf.")
    return limits


def _word(factor: float, blocks: int) -> str:
    if math.isnan(factor):
        return "is not finite"
    change = factor ** max(1, blocks - 1)
    word = "vanishes" if change < 1 / _MOST else "explodes" if change > _MOST else "is healthy"
    return f"{word}: x {factor:.3g} a block, x {change:.2g} from the last to the first"
