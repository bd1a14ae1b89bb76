"""RandAugment (Cubuk 2019, arXiv 1909.13719): a few random operations of one magnitude.

The operations are PIL's, and their ranges those of the authors' code (tensorflow/tpu,
models/official/efficientnet/autoaugment.py). With a higher magnitude the geometric operations are
stronger; the four enhancements go from a factor of 0.1 over 1 (at 5) to 1.9; and solarize and
posterize, as in that code, are weaker.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from resflax.data import transforms

# What is moved into an image: the authors' code's `replace_value`.
FILL = 128.0

# Images are pixels [H, W, C], float32 whole numbers; levels are the magnitude from 0 to 1.
Values = Callable[[jax.Array, float], jax.Array]
Matrix = list[list[jax.Array | float]]
Places = Callable[[jax.Array, int, int], Matrix]


def _identity(image: jax.Array, level: float) -> jax.Array:
    return image


def _auto_contrast(image: jax.Array, level: float) -> jax.Array:
    low = jnp.min(image, (0, 1), keepdims=True)
    span = jnp.max(image, (0, 1), keepdims=True) - low
    return jnp.where(span > 0, (image - low) * 255.0 / jnp.maximum(span, 1.0), image)


def _equalize(image: jax.Array, level: float) -> jax.Array:
    def equalize_channel(values: jax.Array) -> jax.Array:
        counts = jnp.bincount(values.ravel(), length=256)
        step = (values.size - counts[jnp.max(values)]) // 255
        below = jnp.cumsum(counts) - counts
        table = jnp.clip((below + step // 2) // jnp.maximum(step, 1), 0, 255)
        return jnp.where(step > 0, table[values], values)

    equalized = jax.vmap(equalize_channel, 2, 2)(image.astype(jnp.int32))
    return equalized.astype(image.dtype)


def _solarize(image: jax.Array, level: float) -> jax.Array:
    return jnp.where(image < int(level * 256), image, 255.0 - image)


def _posterize(image: jax.Array, level: float) -> jax.Array:
    # One bit at least: TensorFlow shifts eight bits by seven at most.
    step = 2.0 ** (8 - max(1, int(level * 4)))
    return jnp.floor(image / step) * step


def _enhance(degenerate: jax.Array | float, image: jax.Array, level: float) -> jax.Array:
    return transforms.blend(degenerate, image, level * 1.8 + 0.1)


def _colour(image: jax.Array, level: float) -> jax.Array:
    return _enhance(jnp.round(transforms.grey(image)), image, level)


def _contrast(image: jax.Array, level: float) -> jax.Array:
    # PIL's mean luma; the authors' code takes the number of pixels for it.
    return _enhance(jnp.round(jnp.mean(jnp.round(transforms.grey(image)))), image, level)


def _brightness(image: jax.Array, level: float) -> jax.Array:
    return _enhance(0.0, image, level)


def _sharpness(image: jax.Array, level: float) -> jax.Array:
    # PIL's SMOOTH filter: the centre counts five times; the edges stay.
    sums = lax.reduce_window(image, 0.0, lax.add, (3, 3, 1), (1, 1, 1), "VALID")
    inner = (slice(1, -1), slice(1, -1))
    return _enhance(
        image.at[inner].set(jnp.round((sums + 4.0 * image[inner]) / 13.0)), image, level
    )


# From a signed level, height and width to the matrix that takes a place (y, x, 1) in the result to
# one in the image: pixels, from the top left corner.
def _stay(level: jax.Array, height: int, width: int) -> Matrix:
    return [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def _rotate(level: jax.Array, height: int, width: int) -> Matrix:
    angle = level * math.radians(30.0)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    y, x = height / 2, width / 2
    return [[cos, sin, y - cos * y - sin * x], [-sin, cos, x + sin * y - cos * x]]


def _shear_x(level: jax.Array, height: int, width: int) -> Matrix:
    return [[1.0, 0.0, 0.0], [0.3 * level, 1.0, 0.0]]


def _shear_y(level: jax.Array, height: int, width: int) -> Matrix:
    return [[1.0, 0.3 * level, 0.0], [0.0, 1.0, 0.0]]


# The authors move images of 224 pixels by up to 100; other sizes by as large a part.
def _translate_x(level: jax.Array, height: int, width: int) -> Matrix:
    return [[1.0, 0.0, 0.0], [0.0, 1.0, level * (width * 100 / 224)]]


def _translate_y(level: jax.Array, height: int, width: int) -> Matrix:
    return [[1.0, 0.0, level * (height * 100 / 224)], [0.0, 1.0, 0.0]]


# The first of each leaves the image as it is: it stands for all of the other table.
_VALUES: dict[str, Values] = {
    "identity": _identity,
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "solarize": _solarize,
    "posterize": _posterize,
    "colour": _colour,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
}
_PLACES: dict[str, Places] = {
    "stay": _stay,
    "rotate": _rotate,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}

# The paper's 14 (Section 3).
OPERATIONS = (*_VALUES, *list(_PLACES)[1:])


def rand_augment(key: jax.Array, image: jax.Array, *, layers: int, magnitude: float) -> jax.Array:
    """An image after operations that are drawn from all 14, each equally likely.

    Args:
      key: of the draws.
      image: float32 [H, W, 1 or 3], whole-numbered pixels.
      layers: operations, one after the other: N of the paper.
      magnitude: of all of them, from 0 to 10: M. Rotations, shears and translations have a random
        sign, as in the authors' code.

    Returns:
      Whole-numbered pixels, float32 [H, W, C].
    """

    def layer(image: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        operation_key, sign_key = jax.random.split(key)
        operation = jax.random.randint(operation_key, (), 0, len(OPERATIONS))
        sign = jax.random.rademacher(sign_key, (), image.dtype)
        return distort(image, operation, sign, magnitude), None

    return lax.scan(layer, image, jax.random.split(key, layers))[0]


def distort(
    image: jax.Array, operation: jax.Array | int, sign: jax.Array | float, magnitude: float
) -> jax.Array:
    """An image after one operation.

    Args:
      image: float32 [H, W, 1 or 3], whole-numbered pixels.
      operation: position in `OPERATIONS`.
      sign: 1 or -1, of what a geometric operation does.
      magnitude: from 0 to 10.

    Returns:
      Whole-numbered pixels, float32 [H, W, C].
    """
    level = magnitude / 10
    # Over a batch every branch is computed for every image, so that the geometric operations are
    # matrices for one warp, which is exact where nothing moves.
    value = jnp.where(operation < len(_VALUES), operation, 0)
    place = jnp.where(operation < len(_VALUES), 0, operation - len(_VALUES) + 1)
    branches = [lambda x, change=change: change(x, level) for change in _VALUES.values()]
    image = lax.switch(value, branches, image)
    signed = jnp.asarray(sign * level, image.dtype)
    matrices = [move(signed, *image.shape[:2]) for move in _PLACES.values()]
    return jnp.round(_warp(image, jnp.asarray(matrices, image.dtype)[place]))


def _warp(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """An image at the places that a matrix [2, 3] leads to, bilinear, as PIL samples it."""
    height, width, _ = image.shape
    rows, columns = jnp.indices((height, width), image.dtype) + 0.5
    y, x = (row[0] * rows + row[1] * columns + row[2] for row in matrix)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)

    def sample(channel: jax.Array) -> jax.Array:
        points = [y - 0.5, x - 0.5]
        return jax.scipy.ndimage.map_coordinates(channel, points, order=1, mode="nearest")

    return jnp.where(inside[..., None], jax.vmap(sample, 2, 2)(image), FILL)
