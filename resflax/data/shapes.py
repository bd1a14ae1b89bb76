"""Procedural shapes: an endless, download-free data set for image classification.

Every image shows one of ten shapes with random position, rotation, scale, colours and textures.
Each shape fits the unit disc and the ten keep clearly different outlines under any rotation and
scale. Foreground and background colours are drawn from a law that is unchanged when the two are
swapped, so for every class the mean image is the same flat grey and a linear model of the pixels
stays near chance: only shape tells the classes apart.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from resflax.errors import UserError

Implicit = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.9


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # A band this thin keeps the hole open at the smallest radius, about 5 pixels of 32.
    return np.abs(np.hypot(x, y) - 0.72) - 0.24


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.7


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(0.866 * np.abs(x) + 0.5 * y, -y) - 0.5


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    radius = np.hypot(x, y)
    # The ten half-arms are mirror images, so folding the angle leaves a single straight edge: from
    # the tip, at radius 1 and angle 0, to a notch at radius 0.42 and 36 degrees.
    angle = np.abs(np.arctan2(y, x) % (0.4 * np.pi) - 0.2 * np.pi)
    return radius * (0.35 * np.cos(angle) + 0.937 * np.sin(angle)) - 0.35


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.94, np.minimum(x, y) - 0.25)


def _bar(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) - 0.93, np.abs(y) - 0.3)


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # The second disc reaches past the first, so that the horns end in points.
    return np.maximum(np.hypot(x, y) - 0.96, 0.76 - np.hypot(x - 0.46, y))


def _arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    y = np.abs(y)
    head = np.maximum(-x, 0.6 * (x - 0.98) + 0.8 * y)
    shaft = np.maximum(np.abs(x + 0.45) - 0.5, y - 0.2)
    return np.minimum(head, shaft)


def _hourglass(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    # The waist keeps some width: two triangles touching in a point would blur apart.
    return np.maximum(y - 0.76, 0.8 * (x - 0.07) - 0.6 * y)


# Functions of (x, y) in units of the shape's radius: about the signed distance to the outline,
# negative inside. A unit gradient at the outline is what makes the edges equally sharp.
SHAPES: dict[str, Implicit] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "bar": _bar,
    "crescent": _crescent,
    "arrow": _arrow,
    "hourglass": _hourglass,
}
LABEL_NAMES: tuple[str, ...] = tuple(SHAPES)
_OUTLINES = tuple(SHAPES.values())

_MAX_STROKES = 5


def _plain(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.zeros_like(u)


def _gradient(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Coordinates count cycles, several per image: the gain makes one slope span most of the image.
    return np.clip(0.4 * u, -1.0, 1.0)


def _stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi * u)


def _checker(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Clipping the sines gives crisp cells whose edges are still wide enough not to alias.
    return np.clip(3 * np.sin(np.pi * u) * np.sin(np.pi * v), -1.0, 1.0)


# Functions of rotated coordinates in cycles, with values in [-1, 1].
_TEXTURES = (_plain, _gradient, _stripes, _checker)


def _between(easy: float, hard: float, difficulty: float) -> float:
    """Linear interpolation from `easy` at difficulty 0 to `hard` at difficulty 1."""
    return easy + (hard - easy) * difficulty


def _rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along and across a direction, from broadcastable x and y."""
    # Python floats, unlike NumPy float64 scalars, leave the grids in float32.
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _coverage(distance: np.ndarray, size: int) -> np.ndarray:
    """Fraction of each pixel inside an outline, from signed distances in image sides."""
    # A ramp one pixel wide is the coverage by a straight edge, with no need to supersample.
    return np.clip(0.5 - size * distance, 0.0, 1.0)


def _shape_mask(
    outline: Implicit, rng: np.random.Generator, grid: np.ndarray, difficulty: float
) -> np.ndarray:
    """Coverage [size, size] of one shape in a random pose, wholly inside the image."""
    radius = rng.uniform(_between(0.28, 0.17, difficulty), _between(0.4, 0.27, difficulty))
    center_x, center_y = rng.uniform(radius, 1 - radius, 2).tolist()
    x, y = _rotate(
        (grid - center_x) / radius, (grid[:, None] - center_y) / radius, rng.uniform(0, 2 * np.pi)
    )
    return _coverage(outline(x, y) * radius, len(grid))


def _clutter_mask(rng: np.random.Generator, grid: np.ndarray, difficulty: float) -> np.ndarray:
    """Coverage [size, size] of up to _MAX_STROKES short strokes at random places."""
    mask = np.zeros((len(grid), len(grid)), np.float32)
    # All strokes are drawn and the later ones dropped: the random stream that follows, and so the
    # rest of the image, is the same at every difficulty.
    strokes = rng.uniform((0, 0, 0, 0.04), (1, 1, np.pi, 0.1), (_MAX_STROKES, 4)).tolist()
    for center_x, center_y, angle, half in strokes[: int(_MAX_STROKES * difficulty)]:
        along, across = _rotate(grid - center_x, grid[:, None] - center_y, angle)
        distance = np.maximum(np.abs(along) - half, np.abs(across) - 0.015)
        np.maximum(mask, _coverage(distance, len(grid)), out=mask)
    return mask


def _material(
    color: np.ndarray, strength: float, rng: np.random.Generator, grid: np.ndarray
) -> np.ndarray:
    """Image [3, size, size] of one colour under a random texture of the given amplitude."""
    texture = _TEXTURES[rng.integers(len(_TEXTURES))]
    angle, cycles = rng.uniform(0, np.pi), rng.uniform(3, 7)
    center_x, center_y = rng.uniform(0, 1, 2).tolist()
    # Either sign of the tint is equally likely, which keeps the mean image flat.
    tint = (strength * rng.uniform(-1, 1, 3)).astype(np.float32)
    u, v = _rotate((grid - center_x) * cycles, (grid[:, None] - center_y) * cycles, angle)
    # Channels come first until `render`: NumPy is slow over a last axis of three.
    return color[:, None, None] + tint[:, None, None] * texture(u, v)


def _image(
    outline: Implicit, rng: np.random.Generator, grid: np.ndarray, difficulty: float
) -> np.ndarray:
    """One float32 image [3, size, size], nominally in [0, 1] and not yet clipped."""
    direction = rng.standard_normal(3)
    direction /= np.linalg.norm(direction)
    contrast = rng.uniform(_between(0.6, 0.25, difficulty), _between(0.95, 0.5, difficulty))
    # Two colours at a fixed distance, with a middle that keeps both inside the cube.
    half = contrast / 2 * direction
    middle = rng.uniform(np.abs(half), 1 - np.abs(half))
    foreground, background = (middle + half).astype(np.float32), (middle - half).astype(np.float32)

    mask = _shape_mask(outline, rng, grid, difficulty)
    # Strokes made of the shape's own material cannot be told from it by colour.
    mask = np.maximum(mask, _clutter_mask(rng, grid, difficulty))
    strength = contrast * _between(0.1, 0.45, difficulty)
    front = _material(foreground, strength, rng, grid)
    back = _material(background, strength, rng, grid)
    noise = rng.standard_normal((3, len(grid), len(grid)), np.float32)
    return back + mask * (front - back) + _between(0.01, 0.09, difficulty) * noise


def render(
    indices: Sequence[int] | range, *, seed: int, size: int = 32, difficulty: float = 0.3
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the images of the given indices.

    Image i depends on (seed, i, size, difficulty) alone, never on the other indices, so any subset
    of the endless set can be drawn again by itself. Its label is i % 10: a run of indices is
    balanced, but not shuffled. One pair (seed, i) keeps its shape, orientation and hues when the
    difficulty changes. Images are reproducible under one NumPy version, whose random streams and
    float32 functions they are made of.

    Args:
      indices: which images to draw, each >= 0.
      seed: >= 0; names the data set. Use disjoint indices, or another seed, for the test split.
      size: the side of the square images, pixels, >= 16.
      difficulty: from 0 (large, clean, high-contrast shapes) to 1 (small, noisy, low-contrast
        shapes among stray strokes).

    Returns:
      images: uint8 [N, size, size, 3], RGB.
      labels: int32 [N], positions in `LABEL_NAMES`.

    Raises:
      UserError: if `difficulty` is outside [0, 1], `size` < 16, or `seed` or an index is negative.
    """
    # Written so that NaN fails too.
    if not 0 <= difficulty <= 1:
        raise UserError(f"difficulty must be in [0, 1], got {difficulty}")
    if size < 16:
        raise UserError(f"size must be at least 16, got {size}")
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    images = np.empty((len(indices), size, size, 3), np.uint8)
    labels = np.asarray(indices, np.int64) % len(LABEL_NAMES)
    for row, (index, label) in enumerate(zip(indices, labels, strict=True)):
        # One generator per image, not per call, is what makes subsets reproducible.
        rng = np.random.default_rng((seed, index))
        image = _image(_OUTLINES[label], rng, grid, difficulty)
        images[row] = np.clip(255 * image + 0.5, 0, 255).transpose(1, 2, 0)
    return images, labels.astype(np.int32)
