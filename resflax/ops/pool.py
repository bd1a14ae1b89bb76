"""Pooling over NHWC images.

XLA computes the gradient of a maximum by a search that takes ten times as long on a CPU, and four
times on a GPU, as what remembers where each maximum was found: the lowering 'index'. On a CPU
'native', the same by compiled kernels, needs fewer passes over the images.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflax.ops import native, phases

Lowering = Literal["lax", "index", "native"]


def max_pool(
    x: jax.Array,
    window: int,
    stride: int,
    padding: tuple[int, int],
    value: float = -jnp.inf,
    *,
    lowering: Lowering | None = None,
) -> jax.Array:
    """Maximum over square windows.

    Args:
      x: float [N, H, W, C].
      window: the side of the window, pixels.
      stride: the step of the window, pixels.
      padding: pixels before and after, in both directions. (1, 1) is PyTorch's 3x3/2 pool; (0, 1)
        is Caffe's, which rounds the output size up.
      value: of these pixels; 0 in Keras, whose padding is a layer of its own.
      lowering: of the gradient, which goes to the first of equal maxima: 'lax' (XLA's own, whose
        value may lose NaN on a CPU), 'index' (by the place of each maximum in its window, kept
        from the forward pass), 'native' (likewise, by compiled kernels for a CPU: float32,
        channels in sixteens), or None: the fastest known for the platform, where it is available.

    Returns:
      [N, H', W', C].

    Raises:
      ValueError: if 'native' is asked for what it does not know.
    """
    fits_native = x.dtype == jnp.float32 and x.shape[-1] % 16 == 0 and window <= 16
    if lowering is None and fits_native and native.usable():
        lowering = "native"
    if lowering == "native":
        if not fits_native:
            raise ValueError(
                "The lowering 'native' is for float32, channels in sixteens and windows of at most "
                f"16 pixels, not for {x.dtype}{list(x.shape)} and {window}."
            )
        return _max_native(x, window, stride, padding, value)
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)), constant_values=value)
    if lowering is None:
        lowering = "index" if jax.default_backend() in ("cpu", "gpu") else "lax"
    return (_max_by_index if lowering == "index" else _max)(x, window, stride)


def _max(x: jax.Array, window: int, stride: int) -> jax.Array:
    return lax.reduce_window(
        x,
        -jnp.inf,
        lax.max,
        window_dimensions=(1, window, window, 1),
        window_strides=(1, stride, stride, 1),
        padding="VALID",
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_by_index(x: jax.Array, window: int, stride: int) -> jax.Array:
    return _max_forward(x, window, stride)[0]


def _max_forward(
    x: jax.Array, window: int, stride: int
) -> tuple[jax.Array, tuple[jax.Array, tuple[int, ...]]]:
    sizes = [(n - window) // stride + 1 for n in x.shape[1:3]]
    reach = [stride * (n - 1) + 1 for n in sizes]
    best = x[:, : reach[0] : stride, : reach[1] : stride]
    place = jnp.zeros(best.shape, jnp.uint8)
    for k in range(1, window**2):
        top, left = divmod(k, window)
        pixels = x[:, top : top + reach[0] : stride, left : left + reach[1] : stride]
        # Not a maximum of XLA, which may lose NaN on a CPU: see activation.relu.
        better = (pixels > best) | jnp.isnan(pixels)
        place = jnp.where(better, jnp.uint8(k), place)
        best = jnp.where(better, pixels, best)
    return best, (place, x.shape[1:3])


def _max_backward(
    window: int, stride: int, saved: tuple[jax.Array, tuple[int, ...]], dy: jax.Array
) -> tuple[jax.Array]:
    place, size = saved

    def phase(top: int, left: int) -> jax.Array:
        """Of the pixels a stride apart: the sum of what the windows over them found there."""
        most = (window - 1) // stride
        grad = jnp.zeros(
            (dy.shape[0], dy.shape[1] + most, dy.shape[2] + most, dy.shape[3]), dy.dtype
        )
        for i in range(top, window, stride):
            for j in range(left, window, stride):
                found = jnp.where(place == i * window + j, dy, jnp.zeros_like(dy))
                sides = [(k // stride, most - k // stride) for k in (i, j)]
                grad = grad + jnp.pad(found, ((0, 0), *sides, (0, 0)))
        return grad

    rows = [[phase(top, left) for left in range(stride)] for top in range(stride)]
    return (phases.interleave(rows, *size),)


_max_by_index.defvjp(_max_forward, _max_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _max_native(
    x: jax.Array, window: int, stride: int, padding: tuple[int, int], value: float
) -> jax.Array:
    return _max_native_forward(x, window, stride, padding, value)[0]


def _max_native_forward(
    x: jax.Array, window: int, stride: int, padding: tuple[int, int], value: float
) -> tuple[jax.Array, tuple[jax.Array, tuple[int, ...]]]:
    sizes = [(n + sum(padding) - window) // stride + 1 for n in x.shape[1:3]]
    shape = (x.shape[0], *sizes, x.shape[3])
    results = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.float32, jnp.uint8)]
    settings = _windows(window, stride, padding)
    y, place = native.call("MaxPool", results, x, value=np.float32(value), **settings)
    return y, (place, x.shape)


def _max_native_backward(
    window: int,
    stride: int,
    padding: tuple[int, int],
    value: float,
    saved: tuple[jax.Array, tuple[int, ...]],
    dy: jax.Array,
) -> tuple[jax.Array]:
    place, shape = saved
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    settings = _windows(window, stride, padding)
    return (native.call("MaxPoolGradient", result, dy, place, **settings),)


_max_native.defvjp(_max_native_forward, _max_native_backward)


def _windows(window: int, stride: int, padding: tuple[int, int]) -> dict[str, Any]:
    return {
        "side": np.int64(window),
        "stride": np.int64(stride),
        "before": np.int64(padding[0]),
    }


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


def global_max_pool(x: jax.Array) -> jax.Array:
    """Maximum over the positions, NaN where any is NaN: [N, H, W, C] -> float32 [N, C]."""
    # XLA's maximum may lose NaN on a CPU: see activation.relu.
    spoilt = jnp.any(jnp.isnan(x), axis=(1, 2))
    return jnp.where(spoilt, jnp.nan, jnp.max(x, axis=(1, 2))).astype(jnp.float32)


def global_avg_pool(x: jax.Array) -> jax.Array:
    """Mean over the positions, accumulated in float32: [N, H, W, C] -> float32 [N, C]."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
