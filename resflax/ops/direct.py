"""Convolutions by compiled kernels of a CPU: see kernels/convolution.cc and kernels/winograd.cc."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflax.ops import native

# Channels of a group that the direct kernels are compiled for: of wider ones XLA is as fast.
# Narrower ones share a vector of 16.
_WIDTHS = (16, 32, 64, 128, 256)
_NARROW = (1, 2, 4, 8)
# And of photographs: the gradient with respect to them, which training needs not, is XLA's own.
_THIN = (1, 3, 4)

# Channels of a group from which on Winograd's algorithm is used; measured in docs/performance.md.
_WINOGRAD_CHANNELS = 32

Padding = Sequence[tuple[int, int]]


def supports(
    image_shape: Sequence[int],
    kernel_shape: Sequence[int],
    *,
    stride: int,
    padding: Padding,
    groups: int,
) -> bool:
    """Whether there are kernels for such a float32 convolution; shapes as in conv.conv2d."""
    inputs, outputs = kernel_shape[2], kernel_shape[3] // groups
    wide = inputs in _WIDTHS and outputs in _WIDTHS
    narrow = inputs == outputs and inputs in _NARROW and image_shape[-1] % 16 == 0
    thin = is_thin(kernel_shape, groups=groups)
    direct = stride <= 2 and (wide or narrow or thin)
    return min(image_shape) > 0 and (
        direct or suits_winograd(kernel_shape, stride=stride, padding=padding, groups=groups)
    )


def is_thin(kernel_shape: Sequence[int], *, groups: int) -> bool:
    """Whether it is a convolution of photographs: of fewer channels than fill a vector."""
    return groups == 1 and kernel_shape[2] in _THIN and kernel_shape[3] % 16 == 0


def suits_winograd(
    kernel_shape: Sequence[int], *, stride: int, padding: Padding, groups: int
) -> bool:
    """Whether Winograd's algorithm is the faster one: for 3x3 kernels over enough channels.

    It multiplies 16 times where the direct kernels do so 36 times, and the transforms before and
    after take the less of its time the more channels share them.
    """
    channels = kernel_shape[2], kernel_shape[3] // groups
    fits = all(n >= _WINOGRAD_CHANNELS and n % 16 == 0 for n in channels)
    padded = all(0 <= p <= 2 for side in padding for p in side)
    return fits and padded and tuple(kernel_shape[:2]) == (3, 3) and stride == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int
) -> jax.Array:
    """What conv.conv2d computes, of float32 arrays that `supports` is true of.

    The gradient of photographs, should it be wanted, is XLA's own.
    """
    out = [
        (n + sum(p) - k) // stride + 1
        for n, p, k in zip(x.shape[1:3], padding, kernel.shape[:2], strict=True)
    ]
    shape = (x.shape[0], *out, kernel.shape[-1])
    settings = kernel.shape, stride, padding, groups
    return _call("Forward", shape, x, kernel, *settings)


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve(x, kernel, stride, padding, groups), (x, kernel)


def _backward(
    stride: int,
    padding: Padding,
    groups: int,
    saved: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    settings = kernel.shape, stride, padding, groups
    if is_thin(kernel.shape, groups=groups):
        dx = _photographs_gradient(dy, x, kernel, stride, padding)
    else:
        dx = _call("ImageGradient", x.shape, dy, kernel, *settings)
    return dx, _call("KernelGradient", kernel.shape, x, dy, *settings)


convolve.defvjp(_forward, _backward)


def _photographs_gradient(
    dy: jax.Array, x: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> jax.Array:
    def convolved(x: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return jax.linear_transpose(convolved, x)(dy)[0]


def _call(
    name: str,
    shape: Sequence[int],
    first: jax.Array,
    second: jax.Array,
    kernel_shape: Sequence[int],
    stride: int,
    padding: Padding,
    groups: int,
) -> jax.Array:
    winograd = suits_winograd(kernel_shape, stride=stride, padding=padding, groups=groups)
    return native.call(
        f"Winograd{name}" if winograd else name,
        jax.ShapeDtypeStruct(shape, jnp.float32),
        first,
        second,
        groups=np.int64(groups),
        stride=np.int64(stride),
        top=np.int64(padding[0][0]),
        left=np.int64(padding[1][0]),
    )
