"""Pooling over NHWC images."""

import jax
import jax.numpy as jnp
from jax import lax


def max_pool(
    x: jax.Array, window: int, stride: int, padding: tuple[int, int], value: float = -jnp.inf
) -> jax.Array:
    """Maximum over square windows.

    Args:
      x: float [N, H, W, C].
      window: the side of the window, pixels.
      stride: the step of the window, pixels.
      padding: pixels before and after, in both directions. (1, 1) is PyTorch's 3x3/2 pool; (0, 1)
        is Caffe's, which rounds the output size up.
      value: of these pixels; 0 in Keras, whose padding is a layer of its own.

    Returns:
      [N, H', W', C].
    """
    if value != -jnp.inf:
        x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)), constant_values=value)
        padding = (0, 0)
    return lax.reduce_window(
        x,
        -jnp.inf,
        lax.max,
        window_dimensions=(1, window, window, 1),
        window_strides=(1, stride, stride, 1),
        padding=((0, 0), padding, padding, (0, 0)),
    )


def avg_pool(
    x: jax.Array, window: int, stride: int, padding: int = 0, *, count_padding: bool = True
) -> jax.Array:
    """Mean over square windows.

    Args:
      x: float [N, H, W, C].
      window: the side of the window, pixels.
      stride: the step of the window, pixels.
      padding: pixels of zeros on every side.
      count_padding: divide by the whole window, as PyTorch and Caffe do by default, or by the
        pixels of the image in it, as TensorFlow does.

    Returns:
      [N, H', W', C].
    """

    def sums(values: jax.Array) -> jax.Array:
        return lax.reduce_window(
            values,
            0.0,
            lax.add,
            window_dimensions=(1, window, window, 1),
            window_strides=(1, stride, stride, 1),
            padding=((0, 0), (padding, padding), (padding, padding), (0, 0)),
        )

    if count_padding or not padding:
        return sums(x) / window**2
    return sums(x) / sums(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def adaptive_avg_pool(x: jax.Array, size: int | tuple[int, int]) -> jax.Array:
    """Means over size x size windows that cover the image, however large it is.

    Of n pixels, window i has those from floor(i * n / size) up to ceil((i + 1) * n / size), as in
    PyTorch's AdaptiveAvgPool2d: windows overlap where size does not divide n, and repeat pixels
    where n is less.

    Args:
      x: float [N, H, W, C].
      size: side of the result, or its height and width, pixels.

    Returns:
      [N, size, size, C]; `x` itself where it has that size.
    """
    sizes = (size, size) if isinstance(size, int) else size
    if x.shape[1:3] == sizes:
        return x
    # The windows' sides differ, so no windowed reduction fits; two small matrix products do.
    rows, columns = (
        _window_means(n, size).astype(x.dtype) for n, size in zip(x.shape[1:3], sizes, strict=True)
    )
    return jnp.einsum("ph,nhwc,qw->npqc", rows, x, columns)


def _window_means(pixels: int, size: int) -> jax.Array:
    """[size, pixels]: row i takes the mean over window i."""
    window, pixel = jnp.arange(size).reshape(-1, 1), jnp.arange(pixels).reshape(1, -1)
    start, end = window * pixels // size, -(-(window + 1) * pixels // size)
    inside = (pixel >= start) & (pixel < end)
    return inside / (end - start)


def global_avg_pool(x: jax.Array) -> jax.Array:
    """Mean over the positions, accumulated in float32: [N, H, W, C] -> float32 [N, C]."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
