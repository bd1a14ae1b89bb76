"""Convolution with a choice of lowering.

Images are NHWC and kernels HWIO in the whole project.

XLA's CPU backend computes the weight gradient of a grouped convolution with a naive loop. The same
mathematics as a few dense convolutions, each over several groups with a block-diagonal kernel,
takes hundreds of times less (form b of Figure 3 of ResNeXt, arXiv 1611.05431, with a few groups to
a path).
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Lowering = Literal["lax", "blocks", "dot"]
Padding = Sequence[tuple[int, int]]

_NHWC = ("NHWC", "HWIO", "NHWC")


def conv2d(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    padding: Padding = ((0, 0), (0, 0)),
    groups: int = 1,
    looped: bool = False,
    lowering: Lowering | None = None,
) -> jax.Array:
    """Two-dimensional convolution (cross-correlation), plain or grouped.

    Args:
      x: images, [N, H, W, C_in].
      kernel: filters, [k_h, k_w, C_in / groups, C_out], of the dtype of `x`.
      stride: the step of the window in both directions.
      padding: zeros before and after, for the height and for the width.
      groups: the cardinality: output channels of group i see the input channels of group i only.
      looped: whether it is in the body of lax.scan, lax.map or fori_loop. XLA's CPU backend brings
        gradients into the form that its fast kernels take only outside of loops (jax-ml/jax#12868);
        inside, they are written in that form.
      lowering: 'lax' (XLA's own), 'blocks' (a few dense block-diagonal convolutions), 'dot' (one
        matrix product, for 1x1 kernels), or None: the fastest known for the platform and shapes.

    Returns:
      [N, H', W', C_out], the same values for every lowering up to rounding.

    Raises:
      ValueError: if `groups` does not divide the channels, or the kernel does not fit them, or
        'dot' is asked for what is not a plain 1x1 convolution.
    """
    c_in, c_out = x.shape[-1], kernel.shape[-1]
    if c_in % groups or c_out % groups or kernel.shape[2] != c_in // groups:
        raise ValueError(
            f"{groups} groups need input ({c_in}) and output ({c_out}) channels that they divide, "
            f"and a kernel over {c_in}/{groups} channels; its shape is {kernel.shape}."
        )
    pointwise = kernel.shape[:2] == (1, 1) and groups == 1 and not any(map(any, padding))
    if lowering is None:
        lowering = _choose_lowering(jax.default_backend(), pointwise=pointwise, groups=groups)
    if lowering == "dot":
        if not pointwise:
            raise ValueError("The lowering 'dot' is for 1x1 kernels without padding or groups.")
        return _dot(x, kernel, stride)
    looped = looped and jax.default_backend() == "cpu"
    if lowering == "blocks":
        return _blocks(x, kernel, stride, padding, groups, looped)
    if looped and groups == 1:
        return _canonical(x, kernel, stride, tuple(map(tuple, padding)))
    return _lax(x, kernel, stride, padding, groups)


def conv2d_by_paths(
    x: jax.Array,
    kernel: jax.Array,
    *,
    paths: int,
    add: bool,
    stride: int = 1,
    padding: Padding = ((0, 0), (0, 0)),
    groups: int = 1,
    looped: bool = False,
) -> jax.Array:
    """A convolution computed path by path: forms a and b of Figure 3 of ResNeXt (1611.05431).

    Args:
      x: images, [N, H, W, C_in].
      kernel: filters of all paths, [k_h, k_w, C_in / groups, C_out].
      paths: how many convolutions to compute.
      add: whether each path has its part of the input, and their results are added up; otherwise
        each gives its part of the output, out of the whole input or, where `groups` is `paths`,
        its part of it.
      stride: see conv2d.
      padding: see conv2d.
      groups: 1, or `paths` where the results are not added up.
      looped: see conv2d.

    Returns:
      What `conv2d` gives, up to rounding.
    """
    own_input = add or groups == paths
    inputs = jnp.split(x, paths, axis=-1) if own_input else [x] * paths
    kernels = jnp.split(kernel, paths, axis=2 if add else 3)
    outputs = [
        conv2d(part, weights, stride=stride, padding=padding, looped=looped)
        for part, weights in zip(inputs, kernels, strict=True)
    ]
    return functools.reduce(jnp.add, outputs) if add else jnp.concatenate(outputs, axis=-1)


def _choose_lowering(platform: str, *, pointwise: bool, groups: int) -> Lowering:
    """The one place where platform and shapes decide; see the module's docstring for the reason."""
    if platform == "cpu" and pointwise:
        return "dot"
    if platform == "cpu" and groups > 1:
        return "blocks"
    return "lax"


def _lax(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=tuple(padding),
        dimension_numbers=_NHWC,
        feature_group_count=groups,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _canonical(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """A dense convolution whose gradients are convolutions of NHWC images and HWIO kernels."""
    return _lax(x, kernel, stride, padding, 1)


def _canonical_forward(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _lax(x, kernel, stride, padding, 1), (x, kernel)


def _canonical_backward(
    stride: int, padding: Padding, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    window, image, out = kernel.shape[:2], x.shape[1:3], dy.shape[1:3]
    # How far the strided windows reach over the image; what is beyond the last one has no gradient.
    reach = [stride * (n - 1) + 1 for n in out]
    ends = [(k - 1 - p[0]) for k, p in zip(window, padding, strict=True)]
    dx = lax.conv_general_dilated(
        dy,
        jnp.swapaxes(kernel[::-1, ::-1], 2, 3),
        window_strides=(1, 1),
        padding=[
            (e, n + k - 1 - e - r) for e, n, k, r in zip(ends, image, window, reach, strict=True)
        ],
        lhs_dilation=(stride, stride),
        dimension_numbers=_NHWC,
    )
    # Channels as the batch, images as the channels: one window for each place of the kernel.
    dkernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        window_strides=(1, 1),
        padding=[
            (p[0], r + k - 1 - n - p[0])
            for p, n, k, r in zip(padding, image, window, reach, strict=True)
        ],
        rhs_dilation=(stride, stride),
        dimension_numbers=_NHWC,
    )
    return dx, dkernel.transpose(1, 2, 0, 3)


_canonical.defvjp(_canonical_forward, _canonical_backward)


def _dot(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    # Sums in float32, as convolutions have; XLA's CPU backend would add bfloat16 in bfloat16.
    y = jnp.dot(x[:, ::stride, ::stride, :], kernel[0, 0], preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def _blocks(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int, looped: bool
) -> jax.Array:
    blocks = num_blocks(x.shape[-1], groups)
    outputs = [
        conv2d(
            part,
            dense_kernel(weights, groups // blocks),
            stride=stride,
            padding=padding,
            looped=looped,
            lowering="lax",
        )
        for part, weights in zip(
            jnp.split(x, blocks, axis=-1), jnp.split(kernel, blocks, axis=-1), strict=True
        )
    ]
    return jnp.concatenate(outputs, axis=-1)


def num_blocks(channels: int, groups: int) -> int:
    """How many dense convolutions stand for one of `groups` groups over `channels` channels.

    The largest divisor of `groups` that leaves at least 16 channels (the width of an AVX-512
    register in float32) in each: narrower ones leave it idle, wider ones multiply more zeros.
    """
    divisors = [d for d in range(1, groups + 1) if groups % d == 0]
    return max((d for d in divisors if channels // d >= 16), default=1)


def dense_kernel(kernel: jax.Array, groups: int) -> jax.Array:
    """Embeds a grouped kernel in the dense, block-diagonal one that computes the same.

    Args:
      kernel: [k_h, k_w, C_in / groups, C_out].
      groups: the number of diagonal blocks.

    Returns:
      [k_h, k_w, C_in, C_out], zero where input and output channel belong to different groups.
    """
    k_h, k_w, c_in, c_out = kernel.shape
    kernel = kernel.reshape(k_h, k_w, 1, c_in, groups, c_out // groups)
    diagonal = jnp.eye(groups, dtype=kernel.dtype).reshape(1, 1, groups, 1, groups, 1)
    return (kernel * diagonal).reshape(k_h, k_w, groups * c_in, c_out)
