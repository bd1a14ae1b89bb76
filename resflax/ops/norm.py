"""Batch norm, what follows it, and the gates of squeeze-excite, in as few passes as they need.

Batch norm is a statistic of its input and then, like a squeeze-excite gate behind it, one number
that each channel is multiplied by and one that is added. So a norm gives out an `Affine`, which
says what is to be done to its input; a gate changes the numbers, a shortcut joins, and the
activation at the end computes all of it in one pass over the images. The means of a gate's squeeze
come from those of the statistics: no pass is needed for them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflax.ops import activation, native, varying


class Affine(NamedTuple):
    """scale * x + shift + residual, yet to be computed.

    Attributes:
      x: images, [N, H, W, C].
      scale: of each channel, or of each channel of each image; float32, [1 or N, C].
      shift: likewise.
      mean: of each channel of each image of `x`, float32 [N, C]; None: not known yet.
      residual: what is added, of the shape and dtype of `x`, or None.
    """

    x: jax.Array
    scale: jax.Array
    shift: jax.Array
    mean: jax.Array | None = None
    residual: jax.Array | None = None

    def pooled(self) -> jax.Array:
        """The mean over the positions of scale * x + shift, float32 [N, C]; without a residual."""
        mean = self.mean
        if mean is None:
            mean = jnp.mean(self.x, axis=(1, 2), dtype=jnp.float32)
        return mean * self.scale + self.shift

    def gated(self, gates: jax.Array) -> "Affine":
        """(scale * x + shift) * gates, where gates are [N, C]; a residual is not multiplied."""
        gates = gates.astype(jnp.float32)
        return self._replace(scale=self.scale * gates, shift=self.shift * gates)


Activations = jax.Array | Affine


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The means of each image's channels and of their squares.

    Args:
      x: [N, H, W, C].

    Returns:
      `x` again, and two float32 [N, C]. Who uses that `x` from then on has the gradients of all
      three joined in one pass.
    """
    return _moments(x)


def value(y: Activations) -> jax.Array:
    """The array that `y` is, or stands for, in the dtype of its images."""
    return _computed(y, rectify=False) if isinstance(y, Affine) else y


def shape(y: Activations) -> tuple[int, ...]:
    """Of the array that `y` is, or stands for."""
    return y.x.shape if isinstance(y, Affine) else y.shape


def relu(y: Activations) -> jax.Array:
    """max(y, 0), where NaN stays NaN.

    The backward pass needs `y`'s images and at most the result, not the sum.
    """
    if isinstance(y, Affine):
        return _computed(y, rectify=True)
    return activation.relu(y)


def add(shortcut: Activations, y: Activations) -> Activations:
    """The sum of two terms of one shape; it stays uncomputed where `y` does."""
    if isinstance(y, Affine) and y.residual is None:
        return y._replace(residual=value(shortcut))
    return value(shortcut) + value(y)


@jax.custom_vjp
def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    if _fits_native(x):
        mean, square = native.call("Moments", (_per_image(x),) * 2, x)
        return x, mean, square
    full = x.astype(jnp.float32)
    return x, jnp.mean(full, axis=(1, 2)), jnp.mean(jnp.square(full), axis=(1, 2))


def _moments_forward(x):
    results = _moments(x)
    # The images that are given out, not those that came in: a loop would store both.
    return results, results[0]


def _moments_backward(x, gradients):
    dx, dmean, dsquare = gradients
    positions = x.shape[1] * x.shape[2]
    first, second = dmean / positions, dsquare * (2.0 / positions)
    if _fits_native(x):
        operands = dx, x, first, second
        return (native.call("MomentsGradient", x, *operands, aliases={0: 0}),)
    first, second = first[:, None, None, :], second[:, None, None, :]
    return ((dx.astype(jnp.float32) + first + second * x.astype(jnp.float32)).astype(x.dtype),)


_moments.defvjp(_moments_forward, _moments_backward)


def _computed(y: Affine, *, rectify: bool) -> jax.Array:
    return _affine(*varying.alike(y.x, y.scale, y.shift, y.residual), rectify)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _affine(
    x: jax.Array, scale: jax.Array, shift: jax.Array, residual: jax.Array | None, rectify: bool
) -> jax.Array:
    if _fits_native(x):
        return native.call(
            "Affine",
            x,
            *(x, scale, shift, x if residual is None else residual),
            added=np.bool_(residual is not None),
            rectified=np.bool_(rectify),
        )
    y = x.astype(jnp.float32) * scale[:, None, None, :] + shift[:, None, None, :]
    if residual is not None:
        y += residual.astype(jnp.float32)
    y = (activation.relu(y) if rectify else y).astype(x.dtype)
    # Else XLA computes each block's sum anew out of those of all blocks before it in a stage.
    return y if residual is None else lax.optimization_barrier(y)


def _affine_forward(x, scale, shift, residual, rectify):
    y = _affine(x, scale, shift, residual, rectify)
    # Where the rectified sum is positive its gradient passes: the sum itself need not be kept. And
    # where x tells, which is read in any case, not even the result need be read again.
    told = rectify and residual is None and not _fits_native(x)
    saved = x, scale, shift if told else None, y if rectify and not told else None
    return y, (*saved, residual is not None)


def _affine_backward(rectify, saved, dy):
    x, scale, shift, y, has_residual = saved
    if shift is not None:
        y = x.astype(jnp.float32) * scale[:, None, None, :] + shift[:, None, None, :]
    dx, dshift, dscale, dz = _affine_gradients(dy, y, x, scale, has_residual)
    if scale.shape[0] == 1:
        dshift, dscale = (jnp.sum(g, axis=0, keepdims=True) for g in (dshift, dscale))
    return dx, dscale, dshift, dz


def _affine_gradients(dy, y, x, scale, has_residual):
    """Of x, and for each image of the shift and of the scale, and of the residual."""
    rectify = y is not None
    if _fits_native(x):
        # A gradient that passes as it is needs no array of its own.
        copied = (x,) if rectify and has_residual else ()
        results = (x, _per_image(x), _per_image(x), *copied)
        operands = dy, y if rectify else dy, x, scale
        dx, dshift, dscale, *dz = native.call(
            "AffineGradient", results, *operands, rectified=np.bool_(rectify)
        )
        return dx, dshift, dscale, (dz[0] if dz else dy) if has_residual else None
    dz = jnp.where(y > 0, dy, jnp.zeros_like(dy)) if rectify else dy
    full = dz.astype(jnp.float32)
    dshift = jnp.sum(full, axis=(1, 2))
    dscale = jnp.sum(full * x.astype(jnp.float32), axis=(1, 2))
    dx = (full * scale[:, None, None, :]).astype(x.dtype)
    return dx, dshift, dscale, dz if has_residual else None


def _per_image(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.shape[0], x.shape[-1]), jnp.float32)


def _fits_native(x: jax.Array) -> bool:
    """Whether there are kernels for `x`: XLA's CPU backend takes several times as long."""
    return x.dtype == jnp.float32 and x.shape[-1] % 16 == 0 and native.usable()


_affine.defvjp(_affine_forward, _affine_backward)
