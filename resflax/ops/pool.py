"""Pooling over NHWC images."""

import jax
import jax.numpy as jnp
from jax import lax


def max_pool(x: jax.Array, window: int, stride: int, padding: tuple[int, int]) -> jax.Array:
    """Maximum over square windows.

    Args:
      x: float [N, H, W, C].
      window: the side of the window, pixels.
      stride: the step of the window, pixels.
      padding: pixels of minus infinity before and after, in both directions. (1, 1) is PyTorch's
        3x3/2 pool; (0, 1) is Caffe's, which rounds the output size up.

    Returns:
      [N, H', W', C].
    """
    return lax.reduce_window(
        x,
        -jnp.inf,
        lax.max,
        window_dimensions=(1, window, window, 1),
        window_strides=(1, stride, stride, 1),
        padding=((0, 0), padding, padding, (0, 0)),
    )


def global_avg_pool(x: jax.Array) -> jax.Array:
    """Mean over the positions, accumulated in float32: [N, H, W, C] -> float32 [N, C]."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
