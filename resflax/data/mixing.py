"""Batches whose images are mixed from two, and their targets likewise: mixup and CutMix."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from resflax.data import transforms

Mixer = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def mixer(*, mixup: float, cutmix: float) -> Mixer:
    """A function from a key, images [N, H, W, C] and targets [N, classes] to mixed ones.

    Each image is mixed with the one at its place in the reversed batch: batches come in random
    order, so these pairs are as random as those of a permutation, and nothing has to be gathered.
    One share is drawn for the whole batch, as in the papers' code. With both kinds on, a batch is
    mixed by one of them, each with probability 1/2, as timm has it. With none, the function
    returns what it was given.

    Images are floats, normalised or not; targets are probabilities.

    Args:
      mixup: alpha of mixup (Zhang 2017, arXiv 1710.09412): an image's share of the mixture is
        drawn from Beta(alpha, alpha); 0.2 in the paper's ImageNet runs; 0: off.
      cutmix: alpha of CutMix (Yun 2019, arXiv 1905.04899): the share of a box that comes from the
        partner is drawn likewise, its centre is anywhere, and what is outside the image is cut
        off; targets are mixed by the pixels that are left; 1 in the paper; 0: off.

    Raises:
      AugmentationError: if one of them is negative.
    """
    for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if not 0 <= alpha < float("inf"):
            raise transforms.AugmentationError(
                f"mix.{name} {alpha} is the alpha of a Beta distribution: it must be finite "
                "and positive, or 0 for none."
            )

    def mix(key: jax.Array, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not mixup and not cutmix:
            return images, targets
        choice_key, key = jax.random.split(key)
        if not cutmix:
            return _mixup(key, images, targets, alpha=mixup)
        if not mixup:
            return _cutmix(key, images, targets, alpha=cutmix)
        return lax.cond(
            jax.random.bernoulli(choice_key),
            lambda: _mixup(key, images, targets, alpha=mixup),
            lambda: _cutmix(key, images, targets, alpha=cutmix),
        )

    return mix


def _mixup(
    key: jax.Array, images: jax.Array, targets: jax.Array, *, alpha: float
) -> tuple[jax.Array, jax.Array]:
    share = 1.0 - jax.random.beta(key, alpha, alpha)
    return _blend(images, share), _blend(targets, share)


def _cutmix(
    key: jax.Array, images: jax.Array, targets: jax.Array, *, alpha: float
) -> tuple[jax.Array, jax.Array]:
    shape = images.shape[1:]
    area_key, y_key, x_key = jax.random.split(key, 3)
    side = jnp.sqrt(1.0 - jax.random.beta(area_key, alpha, alpha))
    height, width = ((side * n).astype(jnp.int32) for n in shape[:2])
    top = jax.random.randint(y_key, (), 0, shape[0]) - height // 2
    left = jax.random.randint(x_key, (), 0, shape[1]) - width // 2
    mask = transforms.box_mask(shape, (top, left, height, width))
    mixed = jnp.where(mask[None], images[::-1], images)
    return mixed, _blend(targets, jnp.mean(mask, dtype=jnp.float32))


def _blend(values: jax.Array, share: jax.Array) -> jax.Array:
    """A batch, with this share of its reverse."""
    share = share.astype(values.dtype)
    return (1 - share) * values + share * values[::-1]
