"""Stems: from images to the first stage.

To add one, write a class and its row in STEMS; a class from outside needs no row:
`create_model("resnet50", stem=MyStem)`. How it is called: see models.constructors. `filters` are
the network's `stem_filters`; `last` is what follows the last convolution, of 'norm' and 'act', and
may be left out where units begin with them; `pool` and `conv_bias` are as in Stem.
"""

import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from resflax.models import constructors, residual
from resflax.models.constructors import ModuleDef
from resflax.ops import norm as norm_ops
from resflax.ops import pool
from resflax.ops.norm import Activations

# Pixels before and after the image, and what they are.
POOLS: dict[str, tuple[tuple[int, int], float]] = {
    "symmetric": ((1, 1), -jnp.inf),
    "ceil": ((0, 1), -jnp.inf),
    "zeros": ((1, 1), 0.0),
}


class StemConv(NamedTuple):
    """A convolution of a stem: its kernel's side, its stride, and times how many filters."""

    kernel_size: int
    stride: int = 1
    widening: int = 1


class Stem(nn.Module):
    """Convolutions, and a 3x3 max-pool of stride 2.

    Attributes:
      convs: the convolutions, one after another.
      filters: of the first.
      conv, norm, act: of the network.
      pool: a row of POOLS.
      last: what follows the last convolution, of 'norm' and 'act'; both follow the others.
      conv_bias: see residual.has_bias.
      pooled: whether there is the pool.
    """

    deferred: ClassVar[bool] = True

    convs: tuple[StemConv, ...]
    filters: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Activations], jax.Array]
    pool: tuple[tuple[int, int], float]
    last: tuple[str, ...]
    conv_bias: str
    pooled: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H', W', C'], of a size that is rounded up."""
        for i, conv in enumerate(self.convs, start=1):
            suffix = str(i) if len(self.convs) > 1 else ""
            after = self.last if i == len(self.convs) else ("norm", "act")
            x = self._conv(suffix, x, conv, after)
        if not self.pooled:
            return x
        padding, value = self.pool
        return pool.max_pool(x, 3, 2, padding, value)

    def _conv(self, suffix: str, x: jax.Array, conv: StemConv, after: tuple[str, ...]) -> jax.Array:
        filters = conv.widening * self.filters
        bias = residual.has_bias(self.conv_bias, normed="norm" in after)
        settings = {"use_bias": bias, "name": f"conv{suffix}"}
        y: Activations = self.conv(filters, conv.kernel_size, conv.stride, **settings)(x)
        if "norm" in after:
            y = constructors.apply("norm", self.norm(name=f"norm{suffix}"), y)
        return self.act(y) if "act" in after else norm_ops.value(y)


# By the name that ResNet's `stem` has; 'deep' is SENet-154's.
STEMS: dict[str, functools.partial[Stem]] = {
    "imagenet": functools.partial(Stem, (StemConv(7, 2),)),
    "cifar": functools.partial(Stem, (StemConv(3),), pooled=False),
    "deep": functools.partial(Stem, (StemConv(3, 2), StemConv(3), StemConv(3, 1, 2))),
}
