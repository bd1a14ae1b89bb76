"""Local response normalisation over the channels of NHWC images."""

import jax
import jax.numpy as jnp
from jax import lax


def local_response_norm(
    x: jax.Array,
    size: int = 5,
    k: float = 2.0,
    alpha: float = 1e-4,
    beta: float = 0.75,
    divide: bool = False,
) -> jax.Array:
    """Divides each channel by a power of the energy of the channels around it.

    y[c] = x[c] / (k + a * sum of x[j]^2 over |j - c| <= size // 2) ** beta, where channels that do
    not exist add nothing. AlexNet (Krizhevsky 2012), Section 3.3; its constants are the defaults.

    Args:
      x: float [..., C].
      size: channels in the sum, odd: n of the paper.
      k: what keeps the divisor from zero.
      alpha: weight of the sum.
      beta: the exponent.
      divide: whether a is alpha / size, as in Caffe and PyTorch, or alpha, as in the paper and in
        TensorFlow.

    Returns:
      The shape and dtype of `x`; computed in float32.

    Raises:
      ValueError: if `size` is not odd and positive.
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size {size} must be odd and at least 1: a channel is in the middle.")
    channels = x.shape[-1]
    full = x.astype(jnp.float32)
    # A few shifted copies fuse into one pass, forwards and backwards; a windowed reduction over the
    # fastest axis does not.
    sides = [(0, 0)] * (x.ndim - 1) + [(size // 2, size // 2)]
    squares = jnp.pad(jnp.square(full), sides)
    energy = sum(lax.slice_in_dim(squares, i, i + channels, axis=-1) for i in range(size))
    weight = alpha / size if divide else alpha
    return (full * (k + weight * energy) ** -beta).astype(x.dtype)
