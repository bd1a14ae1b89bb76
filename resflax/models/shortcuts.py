"""Shortcuts: how x reaches the sum y = x + F(x) where F changes the shape.

To add one, write a class and its row in SHORTCUTS; a class from outside needs no row:
`create_model("resnet50", shortcut=MyShortcut)`. How it is called: see models.constructors. Blocks
that keep the shape have the identity, unless the class has the attribute `everywhere = True`. The
input is pre-activated in units that begin with norm and activation, unless the class has the
attribute `preactivated = False` (1603.05027, appendix).
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from resflax.errors import UserError
from resflax.models.constructors import ModuleDef
from resflax.ops import pool
from resflax.ops.norm import Activations


class ZeroPadded(nn.Module):
    """Option A (He 2015, arXiv 1512.03385, Section 3.3); see zero_padded_identity."""

    filters: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, ceil(H / stride), ceil(W / stride), filters]."""
        return zero_padded_identity(x, self.filters, self.stride)


class Subsample(ZeroPadded):
    """The identity of every stride-th pixel, for blocks that keep the channels: of no name.

    It is what options A and B become where a stage's last block halves the image.
    """

    preactivated: ClassVar[bool] = False


class Projection(nn.Module):
    """A convolution that gives the shortcut the shape of the branch (He 2015, option B).

    Attributes:
      filters, kernel_size, stride: of the convolution.
      conv, norm: constructors of the layers.
    """

    deferred: ClassVar[bool] = True

    filters: int
    kernel_size: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> Activations:
        """[N, H, W, C] -> [N, ceil(H / stride), ceil(W / stride), filters]."""
        x = self.conv(self.filters, self.kernel_size, self.stride, name="conv")(x)
        return self.norm(name="norm")(x)


class ProjectionEverywhere(Projection):
    """A projection in every block (He 2015, option C)."""

    everywhere: ClassVar[bool] = True


class PooledProjection(Projection):
    """Means of windows of stride x stride pixels, then a projection without a stride: ResNet-D.

    Bag of Tricks, arXiv 1812.01187, Figure 2c: no pixel is skipped. A window that is not whole, at
    the end of an odd side, has the mean of the pixels in it.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> Activations:
        """[N, H, W, C] -> [N, ceil(H / stride), ceil(W / stride), filters]."""
        if self.stride > 1:
            rest = [(0, -side % self.stride) for side in x.shape[1:3]]
            # With the last pixel once more, the mean of two is that of one.
            x = jnp.pad(x, ((0, 0), *rest, (0, 0)), mode="edge")
            x = pool.avg_pool(x, self.stride, self.stride)
        x = self.conv(self.filters, self.kernel_size, name="conv")(x)
        return self.norm(name="norm")(x)


def zero_padded_identity(x: jax.Array, filters: int, stride: int) -> jax.Array:
    """Option A (He 2015, Section 3.3): subsamples, and appends channels of zeros; no parameters.

    Args:
      x: [N, H, W, C].
      filters: channels of the result, at least C.
      stride: every how many pixels one is kept.

    Returns:
      [N, ceil(H / stride), ceil(W / stride), filters].

    Raises:
      UserError: if `filters` is less than C: an identity cannot lose channels.
    """
    channels = x.shape[-1]
    if filters < channels:
        raise UserError(
            f"shortcut 'A' cannot shrink {channels} channels to {filters}: use 'B' or 'C'."
        )
    x = x[:, ::stride, ::stride, :]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, filters - channels)))


# By the name that ResNet's `shortcut` has; None: there is no addition, as in a plain net.
SHORTCUTS: dict[str, ModuleDef | None] = {
    "A": ZeroPadded,
    "B": Projection,
    "C": ProjectionEverywhere,
    "D": PooledProjection,
    "none": None,
}
