"""From uint8 images to what a network sees, on the device: normalisation and augmentation."""

import dataclasses
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to training images; `config.augment` has the defaults.

    Attributes:
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
      AugmentationError: if a setting cannot be.
    """

    crop_padding: int
    flip: bool
    resized_scale: Sequence[float]
    resized_ratio: Sequence[float]
    rand_augment_layers: int
    rand_augment_magnitude: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    lighting: float
    erasing: float
    erasing_area: Sequence[float]
    erasing_ratio: float
    erasing_value: float
    erasing_noise: float
    cutout: int

    def __post_init__(self) -> None:
        for name, most in _LARGEST.items():
            _check_number(name, getattr(self, name), most)
        if self.resized_scale:
            _check_range("resized_scale", self.resized_scale, 1)
            _check_range("resized_ratio", self.resized_ratio, math.inf)
        _check_range("erasing_area", self.erasing_area, 1)
        if not 0 < self.erasing_ratio <= 1:
            raise AugmentationError(
                f"augment.erasing_ratio {self.erasing_ratio} must be more than 0, at most 1."
            )

    def check_channels(self, channels: int) -> None:
        """Raises AugmentationError if images of so many channels do not allow a setting."""
        for names, right in (
            (("saturation", "hue", "lighting"), (3,)),
            (("contrast", "rand_augment_layers"), (1, 3)),
        ):
            settings = {name: getattr(self, name) for name in names}
            on = ", ".join(f"augment.{name} {value}" for name, value in settings.items() if value)
            if on and channels not in right:
                raise AugmentationError(
                    f"{on}: for images of {' or '.join(map(str, right))} channels, and these have "
                    f"{channels}; 0 would be right."
                )

    # Each number makes a key of its own, apart from the two that crop and flip have by splitting.

    def on_pixels(self) -> list[tuple[int, Transform]]:
        """The transforms of pixels from 0 to 255 that are on, in order, each with its number."""
        resize = functools.partial(
            transforms.random_resized_crop, scale=self.resized_scale, ratio=self.resized_ratio
        )
        operations = functools.partial(
            rand_augment, layers=self.rand_augment_layers, magnitude=self.rand_augment_magnitude
        )
        factors = {n: getattr(self, n) for n in ("brightness", "contrast", "saturation", "hue")}
        return _on(
            (2, self.resized_scale, resize),
            (3, self.rand_augment_layers, operations),
            (4, any(factors.values()), functools.partial(transforms.colour_jitter, **factors)),
            (5, self.lighting, functools.partial(transforms.lighting, std=self.lighting)),
        )

    def on_normalised(self) -> list[tuple[int, Transform]]:
        """Likewise the transforms of what is cropped and mirrored."""
        erase = functools.partial(
            transforms.random_erasing,
            probability=self.erasing,
            area=self.erasing_area,
            ratio=self.erasing_ratio,
            value=self.erasing_value,
            noise=self.erasing_noise,
        )
        return _on(
            (6, self.erasing, erase),
            (7, self.cutout, functools.partial(transforms.cutout, side=self.cutout)),
        )


# The largest value of each number, whose least is 0.
_LARGEST = {
    "crop_padding": math.inf,
    "rand_augment_layers": math.inf,
    "rand_augment_magnitude": 10,
    "brightness": math.inf,
    "contrast": math.inf,
    "saturation": math.inf,
    "hue": 0.5,
    "lighting": math.inf,
    "erasing": 1,
    "erasing_noise": math.inf,
    "cutout": math.inf,
}


def augmenter(
    normalize: Callable[[jax.Array], jax.Array], settings: Augmentation
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A function from keys [N] and uint8 images [N, H, W, C] to augmented, normalised ones.

    Each image depends on its own key only, so the result is the same however a batch is split; and
    each kind of augmentation draws from a key of its own, so none changes what another draws. The
    order is that of the papers' code: the resized crop, so that what follows sees what the network
    will; RandAugment, jitter and lighting, on pixels from 0 to 255; the normalisation; the padded
    crop and the mirror image; erasing and cutout, in the end so that nothing moves what is zero.

    Args:
      normalize: of the augmented images.
      settings: which augmentation.

    Raises:
      AugmentationError: in a call, if the images' channels do not allow it.
    """
    on_pixels, on_normalised = settings.on_pixels(), settings.on_normalised()

    def finish(key: jax.Array, image: jax.Array) -> jax.Array:
        crop_key, flip_key = jax.random.split(key)
        if settings.crop_padding:
            image = transforms.pad_and_crop(crop_key, image, padding=settings.crop_padding)
        if settings.flip:
            image = transforms.mirror(flip_key, image)
        return _applied(on_normalised, key, image)

    def augment(keys: jax.Array, images: jax.Array) -> jax.Array:
        settings.check_channels(images.shape[-1])
        if on_pixels:
            change = functools.partial(_applied, on_pixels)
            images = jax.vmap(change)(keys, images.astype(jnp.float32))
        return jax.vmap(finish)(keys, normalize(images))

    return augment


def _on(*transforms: tuple[int, object, Transform]) -> list[tuple[int, Transform]]:
    return [(number, transform) for number, is_on, transform in transforms if is_on]


def _applied(
    numbered: Sequence[tuple[int, Transform]], key: jax.Array, image: jax.Array
) -> jax.Array:
    for number, transform in numbered:
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
