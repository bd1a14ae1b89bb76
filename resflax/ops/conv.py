"""Convolution with a choice of lowering.

Images are NHWC and kernels HWIO in the whole project.

What XLA's CPU backend does with the plain form, and the remedies here:

- The weight gradient of a grouped convolution becomes a naive loop. The same mathematics as a few
  dense convolutions, each over several groups with a block-diagonal kernel, takes hundreds of times
  less (form b of Figure 3 of ResNeXt, arXiv 1611.05431, with a few groups to a path).
- Gradients are brought into the form that its fast kernels take outside of lax.scan, lax.map and
  fori_loop only (jax-ml/jax#12868).
- The images' gradient of a strided convolution is one over images stuffed with zeros.
- A 1x1 convolution is slower than the matrix product that it is.

The lowering 'blocks' is for the first three, also where there is but one group; 'dot' for the last.
Both are compositions of XLA's operations. 'native' calls kernels that are compiled from C++, and is
the fastest where there is one.

And what cuDNN does on a GPU:

- Groups of fewer than 16 channels leave its matrix units idle: 'merged' has fewer and wider ones.
- It computes three channels as slowly as many: 'phases' makes a strided convolution's pixels beside
  each other channels of one (space to depth).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from resflax.ops import direct, native, phases, product, varying

Lowering = Literal["lax", "blocks", "dot", "native", "merged", "phases"]
Padding = Sequence[tuple[int, int]]

_NHWC = ("NHWC", "HWIO", "NHWC")


def conv2d(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    padding: Padding = ((0, 0), (0, 0)),
    groups: int = 1,
    lowering: Lowering | None = None,
) -> jax.Array:
    """Two-dimensional convolution (cross-correlation), plain or grouped.

    Args:
      x: images, [N, H, W, C_in].
      kernel: filters, [k_h, k_w, C_in / groups, C_out], of the dtype of `x`.
      stride: the step of the window in both directions.
      padding: zeros before and after, for the height and for the width.
      groups: the cardinality: output channels of group i see the input channels of group i only.
      lowering: 'lax' (XLA's own), 'blocks' (a few dense convolutions, with gradients in the form
        that is fast everywhere), 'dot' (one matrix product, for 1x1 kernels), 'native' (compiled
        kernels for a CPU, float32 only: see `direct` and `product`), 'merged' (one convolution of
        wider groups), 'phases' (one without a stride, over the image's phases), or None: the
        fastest known for the platform and the shapes, where it is available.

    Returns:
      [N, H', W', C_out], the same values for every lowering up to rounding.

    Raises:
      ValueError: if `groups` does not divide the channels, or the kernel does not fit them, or
        'dot' is asked for what is not a plain 1x1 convolution, 'phases' for groups, or 'native'
        for what it does not know.
    """
    c_in, c_out = x.shape[-1], kernel.shape[-1]
    if c_in % groups or c_out % groups or kernel.shape[2] != c_in // groups:
        raise ValueError(
            f"{groups} groups need input ({c_in}) and output ({c_out}) channels that they divide, "
            f"and a kernel over {c_in}/{groups} channels; its shape is {kernel.shape}."
        )
    padding = tuple((before, after) for before, after in padding)
    if lowering is None:
        pointwise = _is_pointwise(kernel, padding, groups)
        lowering = _choose_lowering(
            jax.default_backend(),
            pointwise=pointwise,
            fits_native=_fits_native(x, kernel, stride, padding, groups),
            images=c_in <= 4 and stride > 1 and groups == 1 and not pointwise,
        )
    return _LOWERINGS[lowering](x, kernel, stride, padding, groups)


def conv2d_by_paths(
    x: jax.Array,
    kernel: jax.Array,
    *,
    paths: int,
    add: bool,
    stride: int = 1,
    padding: Padding = ((0, 0), (0, 0)),
    groups: int = 1,
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

    Returns:
      What `conv2d` gives, up to rounding.
    """
    own_input = add or groups == paths
    inputs = jnp.split(x, paths, axis=-1) if own_input else [x] * paths
    kernels = jnp.split(kernel, paths, axis=2 if add else 3)
    outputs = [
        conv2d(part, weights, stride=stride, padding=padding)
        for part, weights in zip(inputs, kernels, strict=True)
    ]
    return functools.reduce(jnp.add, outputs) if add else jnp.concatenate(outputs, axis=-1)


def _choose_lowering(
    platform: str, *, pointwise: bool, fits_native: bool, images: bool
) -> Lowering:
    """The one place where platform and shapes decide; see the module's docstring for the reason."""
    if platform == "gpu":
        return "phases" if images else "merged"
    if platform != "cpu":
        return "lax"
    if fits_native and native.usable():
        return "native"
    return "dot" if pointwise else "blocks"


def _is_pointwise(kernel: jax.Array, padding: Padding, groups: int) -> bool:
    """Whether it is a product of each pixel with a matrix."""
    return kernel.shape[:2] == (1, 1) and groups == 1 and not any(map(any, padding))


def _fits_native(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int
) -> bool:
    if x.dtype != jnp.float32:
        return False
    if _is_pointwise(kernel, padding, groups):
        return product.supports(kernel.shape[2:]) and x.size > 0
    return direct.supports(x.shape, kernel.shape, stride=stride, padding=padding, groups=groups)


# What follows is a function for each lowering, of what conv2d takes.


def _lax(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int = 1
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=tuple(padding),
        dimension_numbers=_NHWC,
        feature_group_count=groups,
    )


def _native(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int
) -> jax.Array:
    if not _fits_native(x, kernel, stride, padding, groups):
        raise ValueError(
            f"The lowering 'native' is not for kernels {kernel.shape} of {groups} groups with "
            f"stride {stride} on {x.dtype} images {x.shape}."
        )
    if _is_pointwise(kernel, padding, groups):
        return product.multiply(*varying.alike(x[:, ::stride, ::stride, :], kernel[0, 0]))
    return direct.convolve(*varying.alike(x, kernel), stride, padding, groups)


def _merged(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int
) -> jax.Array:
    """One convolution of wider groups."""
    blocks = num_blocks(x.shape[-1], groups, most=groups)
    kernel = jnp.concatenate(_dense_kernels(kernel, groups, blocks), axis=-1)
    return _lax(x, kernel, stride, padding, blocks)


def _over_phases(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int
) -> jax.Array:
    """A convolution of stride 1 over the phases, of a kernel whose taps are put alike."""
    if groups != 1:
        raise ValueError(f"The lowering 'phases' is not for {groups} groups.")
    # Zeros before the kernel, as many as it takes for each window to begin at a first phase.
    shifts = [-before % stride for before, _ in padding]
    fill = [
        (shift, -(shift + taps) % stride)
        for shift, taps in zip(shifts, kernel.shape[:2], strict=True)
    ]
    taps = phases.stack(jnp.pad(kernel, (*fill, (0, 0), (0, 0))).transpose(3, 0, 1, 2), stride)
    pixels = phases.stack(x, stride)
    sides = []
    for axis, (shift, (before, after)) in enumerate(zip(shifts, padding, strict=True)):
        outputs = (x.shape[1 + axis] + before + after - kernel.shape[axis]) // stride + 1
        first = (before + shift) // stride
        last = outputs + taps.shape[1 + axis] - 1 - first - pixels.shape[1 + axis]
        sides.append((first, last))
    # cuDNN's fast kernels read 16 bytes at a time.
    lacking = ((0, 0), (0, 0), (0, 0), (0, -pixels.shape[-1] % 8))
    pixels, taps = jnp.pad(pixels, lacking), jnp.pad(taps, lacking)
    return _lax(pixels, taps.transpose(1, 2, 3, 0), 1, sides)


def _as_product(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int
) -> jax.Array:
    if not _is_pointwise(kernel, padding, groups):
        raise ValueError("The lowering 'dot' is for 1x1 kernels without padding or groups.")
    return _dot(*varying.alike(x, kernel), stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return _product(x, kernel, stride)


def _dot_forward(
    x: jax.Array, kernel: jax.Array, stride: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The images, and not the matrix of them: the layer before keeps them too, and a loop would
    # store both.
    return _product(x, kernel, stride), (x, kernel)


def _dot_backward(
    stride: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    _, pull = jax.vjp(functools.partial(_product, stride=stride), *saved)
    return pull(dy)


_dot.defvjp(_dot_forward, _dot_backward)


def _product(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    x = x[:, ::stride, ::stride, :]
    # Of matrices: XLA would copy the gradient's images into another layout for a sum over three
    # axes. Sums in float32, as convolutions have; the CPU backend would add bfloat16 in bfloat16.
    y = jnp.dot(x.reshape(-1, x.shape[-1]), kernel[0, 0], preferred_element_type=jnp.float32)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def _in_blocks(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int
) -> jax.Array:
    kernels = _dense_kernels(kernel, groups, num_blocks(x.shape[-1], groups))
    return _blocks(*varying.alike(x, jnp.stack(kernels)), stride, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _blocks(x: jax.Array, kernels: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """A dense convolution of each of equal parts of the channels.

    Args:
      x: [N, H, W, blocks * C_in].
      kernels: [blocks, k_h, k_w, C_in, C_out].
      stride: see conv2d.
      padding: see conv2d.

    Returns:
      [N, H', W', blocks * C_out].
    """
    parts = zip(jnp.split(x, len(kernels), axis=-1), kernels, strict=True)
    return jnp.concatenate([_lax(part, k, stride, padding) for part, k in parts], axis=-1)


def _blocks_forward(
    x: jax.Array, kernels: jax.Array, stride: int, padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _blocks(x, kernels, stride, padding), (x, kernels)


def _blocks_backward(
    stride: int, padding: Padding, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernels = saved
    # By phases, the pixels a stride apart: each is a dense convolution of `dy` with some taps.
    rows = [
        [
            _phase_gradient(dy, kernels, (top, left), x.shape[1:3], stride, padding)
            for left in range(stride)
        ]
        for top in range(stride)
    ]
    parts = [jnp.split(array, len(kernels), axis=-1) for array in (dy, x)]
    dkernels = [
        _kernel_gradient(dy_part, x_part, kernels.shape[1:3], stride, padding)
        for dy_part, x_part in zip(*parts, strict=True)
    ]
    return phases.interleave(rows, *x.shape[1:3]), jnp.stack(dkernels)


_blocks.defvjp(_blocks_forward, _blocks_backward)


_LOWERINGS: dict[Lowering, Callable[..., jax.Array]] = {
    "lax": _lax,
    "blocks": _in_blocks,
    "dot": _as_product,
    "native": _native,
    "merged": _merged,
    "phases": _over_phases,
}


def _phase_gradient(
    dy: jax.Array,
    kernels: jax.Array,
    first: Sequence[int],
    image: Sequence[int],
    stride: int,
    padding: Padding,
) -> jax.Array:
    """Of the pixels first, first + stride, ... in both directions.

    With the padding, output o sees pixel first + i * stride through tap k where
    o * stride + k = first + i * stride + before, so only through every stride-th tap.
    """
    padded = [f + p[0] for f, p in zip(first, padding, strict=True)]
    pixels = [-(-(n - f) // stride) for n, f in zip(image, first, strict=True)]
    taps = kernels[:, padded[0] % stride :: stride, padded[1] % stride :: stride]
    if not taps.size or 0 in pixels:  # no window lies on these pixels, or there are none
        return jnp.zeros((dy.shape[0], *pixels, len(kernels) * kernels.shape[3]), dy.dtype)
    starts = [p // stride - (k - 1) for p, k in zip(padded, taps.shape[1:3], strict=True)]
    ends = [
        start + n + k - 1 - outputs
        for start, n, k, outputs in zip(starts, pixels, taps.shape[1:3], dy.shape[1:3], strict=True)
    ]
    dy, sides = _cropped(dy, [(-start, end) for start, end in zip(starts, ends, strict=True)])
    return _blocks(dy, jnp.swapaxes(taps[:, ::-1, ::-1], 3, 4), 1, sides)


def _cropped(x: jax.Array, sides: Padding) -> tuple[jax.Array, Padding]:
    """The images without the pixels that a negative padding takes away, and the padding left.

    On a CPU the convolution that is fastest there (see runtime.configure) reads beyond the images
    where a padding is negative (jaxlib 0.10.2).
    """
    (top, bottom), (left, right) = (tuple(max(-p, 0) for p in side) for side in sides)
    x = x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]
    return x, tuple((max(before, 0), max(after, 0)) for before, after in sides)


def _kernel_gradient(
    dy: jax.Array, x: jax.Array, window: Sequence[int], stride: int, padding: Padding
) -> jax.Array:
    """Channels as the batch, images as the channels: one window for each place of the kernel."""
    image, out = x.shape[1:3], dy.shape[1:3]
    # How far the strided windows reach over the image; what is beyond the last one has no gradient.
    reach = [stride * (n - 1) + 1 for n in out]
    sides: Padding = [
        (p[0], r + k - 1 - n - p[0])
        for p, n, k, r in zip(padding, image, window, reach, strict=True)
    ]
    x, sides = _cropped(x, sides)
    dkernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        window_strides=(1, 1),
        padding=sides,
        rhs_dilation=(stride, stride),
        dimension_numbers=_NHWC,
    )
    return dkernel.transpose(1, 2, 0, 3)


def num_blocks(channels: int, groups: int, most: int = 16) -> int:
    """How many dense convolutions stand for one of `groups` groups over `channels` channels.

    The largest divisor of `groups` that leaves at least 16 channels (the width of an AVX-512
    register in float32, and the depth of a GPU's matrix product in bfloat16) in each: narrower ones
    leave it idle, wider ones multiply more zeros. But no more than `most`, where each is compiled
    on its own.
    """
    divisors = [d for d in range(1, min(groups, most) + 1) if groups % d == 0]
    return max((d for d in divisors if channels // d >= 16), default=1)


def _dense_kernels(kernel: jax.Array, groups: int, blocks: int) -> list[jax.Array]:
    """The dense kernels of `blocks` equal parts of the groups."""
    return [dense_kernel(k, groups // blocks) for k in jnp.split(kernel, blocks, axis=-1)]


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
