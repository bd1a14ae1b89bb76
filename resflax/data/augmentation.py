"""From uint8 images to what a network sees, on the device: normalisation and augmentation."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax


def normalizer(mean: Sequence[float], std: Sequence[float]) -> Callable[[jax.Array], jax.Array]:
    """A function from uint8 [N, H, W, C] to float32, zero mean and unit variance by channel.

    Args:
      mean: of each channel, on a scale of 0 to 1.
      std: standard deviation of each channel, on the same scale.
    """

    def normalize(images: jax.Array) -> jax.Array:
        shape = (1, 1, 1, -1)
        scale = jnp.asarray(std, jnp.float32).reshape(shape) * 255.0
        return (images - jnp.asarray(mean, jnp.float32).reshape(shape) * 255.0) / scale

    return normalize


def augmenter(
    normalize: Callable[[jax.Array], jax.Array], *, crop_padding: int, flip: bool
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A function from keys [N] and uint8 images [N, H, W, C] to augmented, normalised ones.

    Each image depends on its own key only, so the result is the same however a batch is split.

    Args:
      normalize: of the augmented images.
      crop_padding: pixels of zeros added around the normalised image before a crop of its size at
        a random place (He 2015, arXiv 1512.03385, Section 4.2; zero is the mean image).
      flip: whether half of the images are mirrored.
    """

    def augment_one(key: jax.Array, image: jax.Array) -> jax.Array:
        crop_key, flip_key = jax.random.split(key)
        if crop_padding:
            around = (crop_padding, crop_padding)
            padded = jnp.pad(image, (around, around, (0, 0)))
            y, x = jax.random.randint(crop_key, (2,), 0, 2 * crop_padding + 1)
            image = lax.dynamic_slice(padded, (y, x, 0), image.shape)
        if flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        return image

    def augment(keys: jax.Array, images: jax.Array) -> jax.Array:
        return jax.vmap(augment_one)(keys, normalize(images))

    return augment
