"""The phases of an image: its pixels a stride apart, from each of the first ones on.

The gradient of a strided window with respect to the image is dense in each phase, while in the
image as a whole it would be computed from zeros for the most part.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def interleave(phases: Sequence[Sequence[jax.Array]], height: int, width: int) -> jax.Array:
    """Puts an image together from its phases.

    Args:
      phases: row i of phase [p][q] holds the pixels of row p + i * len(phases), columns likewise;
        each [N, H', W', C]. What they lack of the image is zero, what they have more is left out.
      height: of the image.
      width: of the image.

    Returns:
      [N, height, width, C].
    """
    if len(phases) == len(phases[0]) == 1 and phases[0][0].shape[1:3] == (height, width):
        return phases[0][0]
    down, across = len(phases), len(phases[0])
    rows, columns = -(-height // down), -(-width // across)
    # Pixels side by side are channels side by side, and so are lines: long copies. Without the
    # barrier XLA fuses them with what makes the phases, and decides anew at every number.
    phases = lax.optimization_barrier([[_fitted(x, rows, columns) for x in row] for row in phases])
    n, _, _, channels = phases[0][0].shape
    lines = [jnp.concatenate(row, axis=-1).reshape(n, rows, -1) for row in phases]
    image = jnp.concatenate(lines, axis=-1)
    return image.reshape(n, rows * down, columns * across, channels)[:, :height, :width]


def stack(image: jax.Array, stride: int) -> jax.Array:
    """Space to depth: the phases of an image as channels of one.

    Args:
      image: [N, H, W, C]; rows and columns of zeros after it make it a multiple of the stride.
      stride: of the phases, in both directions, pixels.

    Returns:
      [N, H', W', stride * stride * C]: the phases row by row.
    """
    n, height, width, channels = image.shape
    sides = ((0, 0), (0, -height % stride), (0, -width % stride), (0, 0))
    image = jnp.pad(image, sides)
    rows, columns = image.shape[1] // stride, image.shape[2] // stride
    image = image.reshape(n, rows, stride, columns, stride, channels)
    return image.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows, columns, -1)


def _fitted(x: jax.Array, rows: int, columns: int) -> jax.Array:
    x = x[:, :rows, :columns]
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, columns - x.shape[2]), (0, 0)))
