"""Pooling over NHWC images."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def max_pool(x: jax.Array, window: int, stride: int, padding: tuple[int, int]) -> jax.Array:
    """Maximum over square windows.

    Args:
      x: [N, H, W, C].
      window: the side of the window, pixels.
      stride: the step of the window, pixels.
      padding: pixels of minus infinity before and after, in both directions. (1, 1) is PyTorch's
        3x3/2 pool; (0, 1) is Caffe's, which rounds the output size up.

    Returns:
      [N, H', W', C].
    """
    return nn.max_pool(x, (window, window), (stride, stride), (padding, padding))


def global_avg_pool(x: jax.Array) -> jax.Array:
    """Mean over the positions, accumulated in float32: [N, H, W, C] -> float32 [N, C]."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
