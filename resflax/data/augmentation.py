"""From uint8 images to what a network sees, on the device: normalisation and augmentation."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from resflax.data import transforms
from resflax.data.rand_augment import rand_augment
from resflax.data.transforms import AugmentationError

# From a key and an image to the augmented image.
Transform = Callable[[jax.Array, jax.Array], jax.Array]


def normalizer(mean: Sequence[float], std: Sequence[float]) -> Callable[[jax.Array], jax.Array]:
    """A function from uint8 [N, H, W, C] to float32, zero mean and unit variance by channel.

    Args:
      mean: of each channel, on a scale of 0 to 1.
      std: standard deviation of each channel, on the same scale.
    """

    def normalize(images: jax.Array) -> jax.Array:
        shape = (1, 1, 1, -1)
        scale = jnp.asarray(std, jnp.float32).reshape(shape) * 255.0
        pixels = jnp.asarray(images).astype(jnp.float32)
        return (pixels - jnp.asarray(mean, jnp.float32).reshape(shape) * 255.0) / scale

    return normalize


def augmenter(
    normalize: Callable[[jax.Array], jax.Array],
    *,
    crop_padding: int = 0,
    flip: bool = False,
    resized_scale: Sequence[float] = (),
    resized_ratio: Sequence[float] = (3 / 4, 4 / 3),
    rand_augment_layers: int = 0,
    rand_augment_magnitude: float = 9.0,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    lighting: float = 0.0,
    erasing: float = 0.0,
    erasing_area: Sequence[float] = (0.02, 0.4),
    erasing_ratio: float = 0.3,
    erasing_value: float = 0.0,
    erasing_noise: float = 0.0,
    cutout: int = 0,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A function from keys [N] and uint8 images [N, H, W, C] to augmented, normalised ones.

    Each image depends on its own key only, so the result is the same however a batch is split; and
    each kind of augmentation draws from a key of its own, so none changes what another draws. The
    order is that of the papers' code: the resized crop, so that what follows sees what the network
    will; RandAugment, jitter and lighting, on pixels from 0 to 255; the normalisation; the padded
    crop and the mirror image; erasing and cutout, in the end so that nothing moves what is zero.

    Args:
      normalize: of the augmented images.
      crop_padding: pixels of zeros added around the normalised image before a crop of its size at
        a random place (He 2015, arXiv 1512.03385, Section 4.2; zero is the mean image).
      flip: whether half of the images are mirrored.
      resized_scale: least and most area of a random part that is resampled to the image's size, as
        a share of it; (): off (arXiv 1409.4842, Section 6: 0.08 to 1).
      resized_ratio: least and most ratio of that part's width to its height.
      rand_augment_layers: RandAugment's operations on an image (arXiv 1909.13719); 0: off.
      rand_augment_magnitude: of them, from 0 to 10.
      brightness: pixels times a factor within this distance of 1; 0: off. It and the next three
        are torchvision's ColorJitter, in random order.
      contrast: distances from the mean luma times such a factor.
      saturation: distances from a pixel's luma times such a factor.
      hue: turn on the colour circle, to either side; 0.5 is all of it.
      lighting: standard deviation of AlexNet's noise along the principal colours (Krizhevsky 2012,
        Section 4.1: 0.1), before the normalisation, as in fb.resnet.torch; 0: off.
      erasing: probability that a random rectangle is erased (arXiv 1708.04896); 0: off.
      erasing_area: least and most area of it, as a share of the image's.
      erasing_ratio: least ratio of its height to its width; the most is its inverse.
      erasing_value: that it is filled with, after normalisation: 0 is the mean image.
      erasing_noise: standard deviation of normal numbers that are added to it.
      cutout: side of a square of zeros that is centred anywhere, pixels (arXiv 1708.04552); 0: off.

    Raises:
      AugmentationError: if a setting cannot be; or, in a call, if the images' channels do not
        allow it.
    """
    for name, number, most in (
        ("crop_padding", crop_padding, math.inf),
        ("rand_augment_layers", rand_augment_layers, math.inf),
        ("rand_augment_magnitude", rand_augment_magnitude, 10),
        ("brightness", brightness, math.inf),
        ("contrast", contrast, math.inf),
        ("saturation", saturation, math.inf),
        ("hue", hue, 0.5),
        ("lighting", lighting, math.inf),
        ("erasing", erasing, 1),
        ("erasing_noise", erasing_noise, math.inf),
        ("cutout", cutout, math.inf),
    ):
        _check_number(name, number, most)
    if resized_scale:
        _check_range("resized_scale", resized_scale, 1)
        _check_range("resized_ratio", resized_ratio, math.inf)
    _check_range("erasing_area", erasing_area, 1)
    if not 0 < erasing_ratio <= 1:
        raise AugmentationError(
            f"augment.erasing_ratio {erasing_ratio} must be more than 0, at most 1."
        )

    resize = functools.partial(
        transforms.random_resized_crop, scale=resized_scale, ratio=resized_ratio
    )
    jitter = functools.partial(
        transforms.colour_jitter,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
    )
    operations = functools.partial(
        rand_augment, layers=rand_augment_layers, magnitude=rand_augment_magnitude
    )
    erase = functools.partial(
        transforms.random_erasing,
        probability=erasing,
        area=erasing_area,
        ratio=erasing_ratio,
        value=erasing_value,
        noise=erasing_noise,
    )
    # Each number makes a key of its own, apart from the two that crop and flip have by splitting.
    pixel_stages = _Stages(
        (2, resized_scale, resize),
        (3, rand_augment_layers, operations),
        (4, brightness or contrast or saturation or hue, jitter),
        (5, lighting, functools.partial(transforms.lighting, std=lighting)),
    )
    last_stages = _Stages(
        (6, erasing, erase),
        (7, cutout, functools.partial(transforms.cutout, side=cutout)),
    )

    def finish(key: jax.Array, image: jax.Array) -> jax.Array:
        crop_key, flip_key = jax.random.split(key)
        if crop_padding:
            image = transforms.pad_and_crop(crop_key, image, padding=crop_padding)
        if flip:
            image = transforms.mirror(flip_key, image)
        return last_stages(key, image)

    def augment(keys: jax.Array, images: jax.Array) -> jax.Array:
        colour = {"saturation": saturation, "hue": hue, "lighting": lighting}
        luma = {"contrast": contrast, "rand_augment_layers": rand_augment_layers}
        _check_channels(images.shape[-1], colour, (3,))
        _check_channels(images.shape[-1], luma, (1, 3))
        if pixel_stages.on:
            images = jax.vmap(pixel_stages)(keys, images.astype(jnp.float32))
        return jax.vmap(finish)(keys, normalize(images))

    return augment


class _Stages:
    """Those of some transforms of an image that are on, one after the other."""

    def __init__(self, *stages: tuple[int, object, Transform]):
        self.on = [(number, transform) for number, is_on, transform in stages if is_on]

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        for number, transform in self.on:
            image = transform(jax.random.fold_in(key, number), image)
        return image


def _check_number(name: str, number: float, most: float) -> None:
    if not 0 <= number <= most or number == math.inf:
        limit = "at least 0, and finite" if most == math.inf else f"from 0 to {most}"
        raise AugmentationError(f"augment.{name} {number} must be {limit}.")


def _check_range(name: str, pair: Sequence[float], most: float) -> None:
    if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= most or pair[1] == math.inf:
        limit = "" if most == math.inf else f", at most {most}"
        raise AugmentationError(
            f"augment.{name} {tuple(pair)} must be two positive numbers, the least and the most"
            f"{limit}."
        )


def _check_channels(channels: int, settings: dict[str, float], right: tuple[int, ...]) -> None:
    on = ", ".join(f"augment.{name} {value}" for name, value in settings.items() if value)
    if on and channels not in right:
        raise AugmentationError(
            f"{on}: for images of {' or '.join(map(str, right))} channels, and these have "
            f"{channels}; 0 would be right."
        )
