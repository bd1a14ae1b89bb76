"""Training losses: LOSSES is the table of their names.

A loss maps logits, float32 [N, K], and targets, labels int [N] or the classes' probabilities
float32 [N, K], to float32 [N]. One that looks at the images too has a method `on`, which maps
images to such a loss. One with arrays of its own is a pytree of them, which the compiled step takes
as an argument.

To add a loss, write its constructor and add a row to LOSSES. The constructor's arguments with a
default become the fields of `config.loss.NAME` (see resflax.signature).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from resflax import metrics, signature
from resflax.errors import UserError

PyTree = Any
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(*, label_smoothing: float) -> Loss:
    """Cross-entropy with a softmax, in nats: see metrics.cross_entropy."""
    return functools.partial(metrics.cross_entropy, label_smoothing=label_smoothing)


def binary(
    *, label_smoothing: float, threshold: float | None = None, sum_classes: bool = False
) -> Loss:
    """Binary cross-entropy of a sigmoid for each class, in nats (Wightman 2021, arXiv 2110.00476).

    Args:
      label_smoothing: probability spread evenly over all K classes, before the threshold.
      threshold: targets above it become 1, all others 0 (Section 4.1's A1 has 0.2); None: targets
        stay probabilities.
      sum_classes: the sum over the classes, instead of their mean.
    """
    if threshold is not None:
        signature.require(0.0, 1.0, threshold=threshold)

    def loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
        targets = optax.smooth_labels(metrics.probabilities(logits, targets), label_smoothing)
        if threshold is not None:
            targets = (targets > threshold).astype(logits.dtype)
        each = optax.sigmoid_binary_cross_entropy(logits, targets)
        return jnp.sum(each, axis=-1) if sum_classes else jnp.mean(each, axis=-1)

    return loss


def focal(*, gamma: float = 2.0) -> Loss:
    """Focal loss over a softmax, in nats: -(1 - p)^gamma log p (Lin 2017, arXiv 1708.02002, Eq. 4).

    p is the probability of the true class. The loss for probabilities as targets is the mean over
    the classes, weighted by them.

    Args:
      gamma: exponent that lessens the loss of examples that are classified well; 0: cross-entropy.
    """
    signature.require(0.0, 100.0, gamma=gamma)

    def loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(logits)
        # The power's derivative is infinite at 0 if gamma is less than 1.
        others = jnp.maximum(-jnp.expm1(log_p), 1e-30)
        targets = metrics.probabilities(logits, targets)
        return -jnp.sum(targets * others**gamma * log_p, axis=-1)

    return loss


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["variables"],
    meta_fields=["apply", "hard", "temperature", "weight"],
)
@dataclasses.dataclass(frozen=True)
class Distillation:
    """A loss that draws a network's logits to a teacher's (Hinton 2015, arXiv 1503.02531).

    (1 - weight) hard + weight T^2 KL(softmax(teacher / T) || softmax(logits / T)), in nats.

    Attributes:
      apply: the teacher, in evaluation mode: from its variables and normalised images [N, H, W, C]
        to logits [N, K].
      variables: of the teacher.
      hard: the loss of the targets.
      temperature: T, by which both networks' logits are divided. T^2 keeps the gradient's size.
      weight: share of the teacher's part, from 0 to 1.
    """

    apply: Callable[[PyTree, jax.Array], jax.Array]
    variables: PyTree
    hard: Loss
    temperature: float
    weight: float

    def on(self, images: jax.Array) -> Loss:
        """The loss for these images, at which the teacher looks once."""
        taught = lax.stop_gradient(self.apply(self.variables, images)).astype(jnp.float32)
        soft = jax.nn.log_softmax(taught / self.temperature)

        def loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
            log_p = jax.nn.log_softmax(logits / self.temperature)
            distance = self.temperature**2 * jnp.sum(jnp.exp(soft) * (soft - log_p), axis=-1)
            return (1 - self.weight) * self.hard(logits, targets) + self.weight * distance

        return loss


def distillation(
    *,
    label_smoothing: float,
    load_teacher: Callable[[str, str], tuple[Callable[[PyTree, jax.Array], jax.Array], PyTree]],
    teacher: str = "",
    network: str = "",
    temperature: float = 4.0,
    weight: float = 0.5,
) -> Distillation:
    """Distillation from a teacher, beside cross-entropy: see Distillation.

    Args:
      label_smoothing: of the cross-entropy.
      load_teacher: from `teacher` and `network` to Distillation's `apply` and `variables`.
      teacher: a run's directory, or a file of weights, as for config.init_from.
      network: of resflax.list_models(), whose weights the file has; "" for a run.
      temperature: T, by which both networks' logits are divided.
      weight: share of the teacher's part, from 0 to 1.
    """
    if not teacher:
        raise UserError("teacher must be a run's directory or a file of weights.")
    signature.require(1e-3, 1e3, temperature=temperature)
    signature.require(0.0, 1.0, weight=weight)
    apply, variables = load_teacher(teacher, network)
    hard = cross_entropy(label_smoothing=label_smoothing)
    return Distillation(apply, variables, hard, temperature, weight)


LOSSES: dict[str, Callable[..., Loss | Distillation]] = {
    "cross_entropy": cross_entropy,
    "binary": binary,
    "focal": focal,
    "distillation": distillation,
}


def of(config: Mapping[str, Any], **shared: Any) -> Loss | Distillation:
    """The loss that `config.loss` names.

    Args:
      config: `config.loss`.
      **shared: `label_smoothing` and `load_teacher`, for the constructors that take them.

    Raises:
      UserError: if a field has a value that the loss cannot have.
    """
    make = LOSSES[config["name"]]
    taken = {name: shared[name] for name in signature.shared(make)}
    return make(**taken, **config.get(config["name"], {}))


def on(loss: Any, images: jax.Array) -> Loss:
    """The loss for some images, [N, H, W, C]: see the module's docstring."""
    bound: Loss = loss.on(images) if hasattr(loss, "on") else loss
    return bound


def has_arrays(loss: Any) -> bool:
    """Whether a loss is a pytree of arrays, and not just a function."""
    return all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(loss))


def checked(loss: Loss) -> Loss:
    """The loss, which raises UserError where it is traced unless it gives a number per example."""

    def call(logits: jax.Array, targets: jax.Array) -> jax.Array:
        values = loss(logits, targets)
        shape, dtype = getattr(values, "shape", None), getattr(values, "dtype", type(values))
        if shape != logits.shape[:1] or not jnp.issubdtype(dtype, jnp.floating):
            found = dtype.__name__ if shape is None else f"{dtype} {list(shape)}"
            raise UserError(
                f"the loss gives {found} for logits {list(logits.shape)}; it must give a float "
                f"for each example, [{logits.shape[0]}]."
            )
        return values

    return call
