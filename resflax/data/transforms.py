"""Operations on one image, each random one from a key: shapes are static, so that they compile.

Images [H, W, C] are float32. What the docstrings call pixels has values from 0 to 255, before
normalisation; the rest takes any values, and zero is the mean image after normalisation.
"""

import functools
import math
from collections.abc import Callable, Sequence

import dm_pix
import jax
import jax.numpy as jnp
from jax import lax

from resflax.errors import UserError

# Of the pixels of ImageNet on a scale of 0 to 1: the covariance's eigenvalues and, in columns, its
# eigenvectors over red, green and blue (fb.resnet.torch, datasets/imagenet.lua).
LIGHTING_EIGENVALUES = (0.2175, 0.0188, 0.0045)
LIGHTING_EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)

# Where published code draws sizes until one fits, this many are drawn and the first that fits is
# taken. It is torchvision's limit for a resized crop; with the usual areas it is all but never met.
_DRAWS = 10

Box = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # top, left, height, width: pixels


class AugmentationError(UserError):
    """Images cannot be augmented so; the message says which setting, and what would be right."""


def pad_and_crop(key: jax.Array, image: jax.Array, *, padding: int) -> jax.Array:
    """A crop of the image's size at a random place, after `padding` zeros were added around it.

    He 2015, arXiv 1512.03385, Section 4.2.
    """
    around = (padding, padding)
    padded = jnp.pad(image, (around, around, (0, 0)))
    y, x = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return lax.dynamic_slice(padded, (y, x, 0), image.shape)


def mirror(key: jax.Array, image: jax.Array) -> jax.Array:
    """The image, or its mirror image, with equal probability."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def random_resized_crop(
    key: jax.Array, image: jax.Array, *, scale: Sequence[float], ratio: Sequence[float]
) -> jax.Array:
    """A random part of an image, resampled to the image's size.

    Szegedy 2014, arXiv 1409.4842, Section 6. Area and aspect ratio are drawn until the part is
    inside the image: here the first of ten draws that is, and otherwise the largest part in the
    middle whose ratio is allowed, as torchvision's RandomResizedCrop has it.

    Args:
      key: of the draws.
      image: pixels.
      scale: least and most area of the part, as a share of the image's; uniform.
      ratio: least and most ratio of its width to its height; its logarithm is uniform.

    Returns:
      Whole-numbered pixels.
    """
    return resized_crop(image, _resized_crop_box(key, image.shape, scale, ratio))


def resized_crop(image: jax.Array, box: Box) -> jax.Array:
    """The box of an image, resampled to the image's size: whole-numbered pixels.

    Bilinear, with a filter that grows as the image shrinks, like PIL's `resize(box=...)`: beside
    the edges of the box it sees the image's own pixels.
    """
    top, left, height, width = (jnp.asarray(side, jnp.float32) for side in box)
    zoom = jnp.stack([image.shape[0] / height, image.shape[1] / width])
    shift = -jnp.stack([top, left]) * zoom
    return jnp.round(
        jax.image.scale_and_translate(image, image.shape, (0, 1), zoom, shift, "linear")
    )


def _resized_crop_box(
    key: jax.Array, shape: tuple[int, ...], scale: Sequence[float], ratio: Sequence[float]
) -> Box:
    height, width, _ = shape
    scale_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    low, high = (math.log(r) for r in ratio)
    ratios = jnp.exp(jax.random.uniform(ratio_key, (_DRAWS,), minval=low, maxval=high))
    areas = jax.random.uniform(scale_key, (_DRAWS,), minval=scale[0], maxval=scale[1])
    areas *= height * width
    heights = jnp.round(jnp.sqrt(areas / ratios)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(areas * ratios)).astype(jnp.int32)
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = jnp.argmax(fits)
    top = jax.random.randint(top_key, (), 0, jnp.maximum(height - heights[first], 0) + 1)
    left = jax.random.randint(left_key, (), 0, jnp.maximum(width - widths[first], 0) + 1)
    allowed = min(max(width / height, ratio[0]), ratio[1])
    whole_height = min(height, round(width / allowed))
    whole_width = min(width, round(height * allowed))
    drawn = (top, left, heights[first], widths[first])
    middle = ((height - whole_height) // 2, (width - whole_width) // 2, whole_height, whole_width)
    box = jnp.where(jnp.any(fits), jnp.stack(drawn), jnp.asarray(middle, jnp.int32))
    return box[0], box[1], box[2], box[3]


def grey(image: jax.Array) -> jax.Array:
    """The luma (ITU-R 601) of an image [H, W, 1 or 3]: [H, W, 1]."""
    return image if image.shape[-1] == 1 else dm_pix.rgb_to_grayscale(image)


def blend(degenerate: jax.Array | float, image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Pixels between (factor 0 to 1) or beyond (above 1) two images, clipped."""
    return jnp.clip(degenerate + factor * (image - degenerate), 0.0, 255.0)


def adjust_brightness(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Pixels times the factor."""
    return blend(0.0, image, factor)


def adjust_contrast(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """The differences of pixels from the mean luma, times the factor."""
    return blend(jnp.mean(grey(image)), image, factor)


def adjust_saturation(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """The differences of pixels from their luma, times the factor."""
    return blend(grey(image), image, factor)


def adjust_hue(image: jax.Array, turns: jax.Array | float) -> jax.Array:
    """Pixels [H, W, 3] whose hue is turned on the colour circle: 1 is all the way round."""
    return 255.0 * dm_pix.adjust_hue(image / 255.0, turns)


def colour_jitter(
    key: jax.Array,
    image: jax.Array,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> jax.Array:
    """Random brightness, contrast, saturation and hue, one after the other in random order.

    Howard 2013, arXiv 1312.5402, as torchvision's ColorJitter has it.

    Args:
      key: of the draws.
      image: pixels; saturation and hue need three channels.
      brightness: the factor is uniform within this distance of 1, and not below 0. Here as in the
        others, 0 leaves the operation out.
      contrast: likewise.
      saturation: likewise.
      hue: the turn is uniform from -hue to hue, at most 0.5.
    """
    adjusts = {
        adjust_brightness: brightness,
        adjust_contrast: contrast,
        adjust_saturation: saturation,
        adjust_hue: hue,
    }
    order_key, *keys = jax.random.split(key, 1 + len(adjusts))
    steps: list[Callable[[jax.Array], jax.Array]] = []
    for own_key, (adjust, strength) in zip(keys, adjusts.items(), strict=True):
        if not strength:
            continue
        low, high = max(0.0, 1.0 - strength), 1.0 + strength
        if adjust is adjust_hue:
            low, high = -strength, strength
        amount = jax.random.uniform(own_key, minval=low, maxval=high)
        steps.append(functools.partial(_adjusted, adjust, amount))
    for step in jax.random.permutation(order_key, len(steps)):
        image = lax.switch(step, steps, image)
    return image


def _adjusted(
    adjust: Callable[[jax.Array, jax.Array], jax.Array], amount: jax.Array, image: jax.Array
) -> jax.Array:
    return adjust(image, amount)


def lighting(key: jax.Array, image: jax.Array, *, std: float) -> jax.Array:
    """AlexNet's noise: all pixels [H, W, 3] move along the principal axes of ImageNet's colours.

    Krizhevsky 2012, Section 4.1, with fb.resnet.torch's axes. Nothing is clipped.

    Args:
      key: of the draws.
      image: pixels.
      std: of the normal number that each eigenvalue is multiplied by; 0.1 in the papers.
    """
    sizes = std * jax.random.normal(key, (1, 3)) * jnp.asarray([LIGHTING_EIGENVALUES])
    shift = jnp.sum(jnp.asarray(LIGHTING_EIGENVECTORS) * sizes, axis=1)
    return image + 255.0 * shift.reshape(1, 1, 3)


def box_mask(shape: tuple[int, ...], box: Box) -> jax.Array:
    """Where an image [H, W, C] has a box, which may reach beyond its edges: bool [H, W, 1]."""
    top, left, height, width = box
    rows = jnp.arange(shape[0]).reshape(-1, 1, 1)
    columns = jnp.arange(shape[1]).reshape(1, -1, 1)
    return (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)


def random_erasing(
    key: jax.Array,
    image: jax.Array,
    *,
    probability: float,
    area: Sequence[float],
    ratio: float,
    value: float,
    noise: float,
) -> jax.Array:
    """A random rectangle of a normalised image erased.

    Zhong 2017, arXiv 1708.04896, Algorithm 1. As in the authors' code the size alone is drawn
    until it fits, here the first of ten draws that does, and then a place where the rectangle is
    whole; where none fits, nothing is erased.

    Args:
      key: of the draws.
      image: normalised.
      probability: that anything is erased.
      area: least and most of the rectangle's, as a share of the image's; uniform.
      ratio: least ratio of its height to its width; the most is 1 / ratio; uniform.
      value: that it is filled with.
      noise: standard deviation of normal numbers that are added to it.
    """
    height, width, _ = image.shape
    erase_key, area_key, ratio_key, top_key, left_key, noise_key = jax.random.split(key, 6)
    areas = jax.random.uniform(area_key, (_DRAWS,), minval=area[0], maxval=area[1])
    areas *= height * width
    ratios = jax.random.uniform(ratio_key, (_DRAWS,), minval=ratio, maxval=1.0 / ratio)
    heights = jnp.round(jnp.sqrt(areas * ratios)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(areas / ratios)).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits)
    top = jax.random.randint(top_key, (), 0, jnp.maximum(height - heights[first], 0) + 1)
    left = jax.random.randint(left_key, (), 0, jnp.maximum(width - widths[first], 0) + 1)
    erased = jax.random.bernoulli(erase_key, probability) & jnp.any(fits)
    filling = value + noise * jax.random.normal(noise_key, image.shape, image.dtype)
    mask = box_mask(image.shape, (top, left, heights[first], widths[first]))
    return jnp.where(mask & erased, filling, image)


def cutout(key: jax.Array, image: jax.Array, *, side: int) -> jax.Array:
    """A square of zeros whose centre is anywhere in the image, so that a part may be outside.

    DeVries 2017, arXiv 1708.04552, Section 3.2.

    Args:
      key: of the place.
      image: normalised.
      side: pixels.
    """
    y_key, x_key = jax.random.split(key)
    top = jax.random.randint(y_key, (), 0, image.shape[0]) - side // 2
    left = jax.random.randint(x_key, (), 0, image.shape[1]) - side // 2
    size = jnp.asarray(side)
    return jnp.where(box_mask(image.shape, (top, left, size, size)), 0.0, image)


def center_crop(images: jax.Array, size: int) -> jax.Array:
    """The middle square of images [N, H, W, C]: [N, size, size, C].

    Raises:
      AugmentationError: if the images are smaller.
    """
    _check_crop(images, size)
    return dm_pix.center_crop(images, size, size)


def ten_crop(images: jax.Array, size: int) -> jax.Array:
    """Squares of images [N, H, W, C]: [10, N, size, size, C].

    Top left, top right, bottom left, bottom right, the middle, and then the mirror images of these
    five, whose predictions AlexNet averages (Krizhevsky 2012, Section 4.1).

    Raises:
      AugmentationError: if the images are smaller.
    """
    _check_crop(images, size)
    crops = jnp.stack(
        [
            images[:, :size, :size],
            images[:, :size, -size:],
            images[:, -size:, :size],
            images[:, -size:, -size:],
            center_crop(images, size),
        ]
    )
    return jnp.concatenate([crops, crops[:, :, :, ::-1]])


def _check_crop(images: jax.Array, size: int) -> None:
    height, width = images.shape[1:3]
    if not 1 <= size <= min(height, width):
        raise AugmentationError(
            f"a crop of {size} pixels of images of {height}x{width} must be from 1 to "
            f"{min(height, width)}."
        )
