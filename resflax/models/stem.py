"""The stem of a ResNet: from images to the first stage."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from resflax.models import layers, residual
from resflax.ops import norm as norm_ops
from resflax.ops import pool
from resflax.ops.norm import Activations


@dataclasses.dataclass(frozen=True)
class Layers:
    """The constructors that a network hands down to its parts, with dtype, mode and axis bound."""

    conv: layers.ModuleDef
    norm: layers.ModuleDef
    act: Callable[[Activations], jax.Array]


# Pixels before and after the image, and what they are.
POOLS: dict[str, tuple[tuple[int, int], float]] = {
    "symmetric": ((1, 1), -jnp.inf),
    "ceil": ((0, 1), -jnp.inf),
    "zeros": ((1, 1), 0.0),
}


class Stem(nn.Module):
    """From images to the first stage: see ResNet.stem.

    Attributes:
      kind: 'imagenet', 'cifar' or 'deep'.
      filters: of its first convolution.
      parts: of the network.
      pool: a row of POOLS.
      last: what follows the last convolution, of 'norm' and 'act'; both follow the others.
      conv_bias: see residual.has_bias.
    """

    kind: str
    filters: int
    parts: Layers
    pool: tuple[tuple[int, int], float]
    last: tuple[str, ...]
    conv_bias: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H / 4, W / 4, filters], rounded up; 'cifar': [N, H, W, filters]."""
        if self.kind == "cifar":
            return self._conv("", x, self.filters, 3, after=self.last)
        if self.kind == "imagenet":
            x = self._conv("", x, self.filters, 7, 2, after=self.last)
        else:
            x = self._conv("1", x, self.filters, 3, 2)
            x = self._conv("2", x, self.filters, 3)
            x = self._conv("3", x, 2 * self.filters, 3, after=self.last)
        padding, value = self.pool
        return pool.max_pool(x, 3, 2, padding, value)

    def _conv(
        self,
        suffix: str,
        x: jax.Array,
        filters: int,
        kernel_size: int,
        stride: int = 1,
        after: tuple[str, ...] = ("norm", "act"),
    ) -> jax.Array:
        bias = residual.has_bias(self.conv_bias, normed="norm" in after)
        conv = self.parts.conv(filters, kernel_size, stride, use_bias=bias, name=f"conv{suffix}")
        x = conv(x)
        if "norm" in after:
            x = self.parts.norm(name=f"norm{suffix}")(x)
        return self.parts.act(x) if "act" in after else norm_ops.value(x)
