"""Network In Network: small perceptrons slid over the image, and no dense layer (arXiv 1312.4400).

The paper does not list its widths; these are the ones of its Caffe model for CIFAR-10.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resflax.errors import UserError
from resflax.models import checks, layers
from resflax.ops import activation, pool

# Side of the first kernel of each block; the others are 1x1.
KERNEL_SIZES = (5, 5, 3)

# Output channels of the blocks' convolutions; the last block ends in the head.
WIDTHS = ((192, 160, 96), (192, 192, 192), (192, 192))


class NIN(nn.Module):
    """Three blocks of a wide and of 1x1 convolutions, averaged over the image, to logits.

    Variables: 'params'; random numbers: 'dropout' where `dropout` is not zero and `train` is true.

    Attributes:
      num_classes: maps out of the last convolution.
      widths: output channels of the convolutions of each block, but the last one of the last.
      dropout: rate after the first and the second block (Section 4.1).
      dtype: of the computation. Parameters and logits are float32.
    """

    num_classes: int = 10
    widths: Sequence[Sequence[int]] = WIDTHS
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, features: bool = False
    ) -> jax.Array | dict[str, jax.Array]:
        """Computes logits.

        Args:
          images: float [N, H, W, C], normalised, of any size from 4 pixels.
          train: whether dropout drops.
          features: whether to return what comes out of every part of the network.

        Returns:
          float32 [N, num_classes]; with `features`, that and the maps before it by name: 'block1'
          to 'block3' [N, H', W', C'], 'logits'.

        Raises:
          UserError: if `images` has not four axes, or is too small for the pools.
        """
        if images.ndim != 4 or min(images.shape[1:3]) < 4:
            raise UserError(
                "images must be [N, H, W, C] with H and W at least 4, for two pools; "
                f"their shape is {images.shape}."
            )
        conv = functools.partial(
            layers.Conv,
            use_bias=True,
            kernel_init=nn.initializers.normal(0.05),
            dtype=self.dtype,
        )
        dropout = functools.partial(nn.Dropout, self.dropout, deterministic=not train)
        first, second, third = (
            Block(widths, size, conv, name=f"block{i}")
            for i, (widths, size) in enumerate(zip(self.widths, KERNEL_SIZES, strict=True), start=1)
        )
        outputs = {}
        x = outputs["block1"] = first(images)
        x = dropout(name="dropout1")(pool.max_pool(x, 3, 2, (0, 1)))
        x = outputs["block2"] = second(x)
        x = dropout(name="dropout2")(_ceil_avg_pool(x))
        x = outputs["block3"] = third(x)
        outputs["logits"] = Head(self.num_classes, conv, name="head")(x)
        return outputs if features else outputs["logits"]


class Block(nn.Module):
    """A convolution and the perceptron over its output, with ReLUs (Section 3.1: mlpconv)."""

    widths: Sequence[int]
    kernel_size: int
    conv: layers.ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H, W, widths[-1]]."""
        for i, filters in enumerate(self.widths, start=1):
            size = self.kernel_size if i == 1 else 1
            x = activation.relu(self.conv(filters, size, name=f"conv{i}")(x))
        return x


class Head(nn.Module):
    """A map for each class, and its mean (Section 3.2). The Caffe model has a ReLU between them."""

    num_classes: int
    conv: layers.ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> float32 [N, num_classes], not negative."""
        return pool.global_avg_pool(activation.relu(self.conv(self.num_classes, name="conv")(x)))


def _ceil_avg_pool(x: jax.Array) -> jax.Array:
    """3x3/2 means, over what of the window lies in the image: [N, H, W, C] -> half, rounded down.

    Caffe's pools end beyond the image where it is even, and do not count the pixels there.
    """
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    pooled, share = (
        pool.avg_pool(jnp.pad(y, ((0, 0), (0, 1), (0, 1), (0, 0))), 3, 2) for y in (x, ones)
    )
    return pooled / share


def cifar_nin(widths: Sequence[Sequence[int]] = WIDTHS, **arguments: Any) -> NIN:
    """Network In Network for 32x32 images.

    Args:
      widths: see `NIN`.
      **arguments: of `NIN`.

    Raises:
      UserError: if an argument makes no network.
    """
    # Modules are hashed and compared.
    if len(widths) != len(KERNEL_SIZES) or not all(map(_is_block, widths)):
        raise UserError(f"widths {widths} must be three lists of numbers of at least 1.")
    model = NIN(widths=tuple(map(tuple, widths)), **arguments)
    checks.positive(model, "num_classes")
    checks.rates(model, "dropout")
    return model


def _is_block(widths: Any) -> bool:
    """Whether they are the widths of a block's convolutions."""
    return (
        isinstance(widths, list | tuple)
        and len(widths) > 0
        and all(isinstance(width, int) and width >= 1 for width in widths)
    )
