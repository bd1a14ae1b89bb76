"""Losses and metrics of a batch, summed so that they add up exactly over batches and devices."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of each example, in nats.

    Args:
      logits: float32 [N, K].
      labels: int [N]; or the classes' probabilities, float32 [N, K].
      label_smoothing: probability spread evenly over all K classes, the true one included
        (Szegedy 2015, arXiv 1512.00567, Section 7).

    Returns:
      float32 [N].
    """
    is_class = labels.ndim == 1
    if is_class and not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = probabilities(logits, labels)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def probabilities(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The classes' probabilities, float32 [N, K], of labels, int [N], or as they are given."""
    return jax.nn.one_hot(labels, logits.shape[-1]) if labels.ndim == 1 else labels


def in_top_k(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether the true class is among the k largest logits, of each example: float32 [N].

    Ties count against the prediction, so a network that gives out a constant is never right.
    """
    true = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    others = jnp.sum(logits >= true, axis=-1) - 1
    # A comparison with NaN is false, so a NaN would rank first.
    return ((others < k) & jnp.isfinite(true[:, 0])).astype(jnp.float32)


def summed(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over the examples whose mask is 1: 'loss' (nats), 'top1', 'top5' (hits), 'count'.

    An example with a logit that is not finite is no hit, and its loss is NaN.

    Args:
      logits: float32 [N, K].
      labels: int [N].
      mask: float [N], 1 for an example, 0 for padding.
    """
    finite = jnp.isfinite(logits).all(-1)
    loss = jnp.where(finite, cross_entropy(logits, labels), jnp.nan)
    return {
        "loss": jnp.sum(loss, where=mask > 0),
        "top1": jnp.sum(in_top_k(logits, labels, 1) * finite * mask),
        "top5": jnp.sum(in_top_k(logits, labels, 5) * finite * mask),
        "count": jnp.sum(mask),
    }


def line(evaluation: Mapping[str, float], num_classes: int) -> str:
    """An evaluation for a person: 'eval loss 0.2500  top-1 87.50%  top-5 98.00%'.

    Top-5 of at most five classes, which is always 100 %, is left out.

    Args:
      evaluation: 'loss' (nats), 'top1' and 'top5' (fractions).
      num_classes: of the data set.
    """
    text = f"eval loss {evaluation['loss']:.4f}  top-1 {evaluation['top1']:.2%}"
    if num_classes > 5:
        text += f"  top-5 {evaluation['top5']:.2%}"
    return text if math.isfinite(evaluation["loss"]) else f"{text}  (logits are not finite)"
