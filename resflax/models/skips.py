"""What is done to both terms of the sum y = x + F(x) before they are added.

To add one, write a class and its row in SKIPS; a class from outside needs no row:
`create_model("resnet50", skip=MySkip)`. How it is called: see models.constructors.
"""

import functools

import flax.linen as nn
import jax

from resflax.models.constructors import ModuleDef

# The shortcut's and the branch's term of the sum.
Terms = tuple[jax.Array, jax.Array]


class Scaling(nn.Module):
    """Both terms of the sum times a constant (1603.05027, Section 3.1, constant scaling)."""

    skip_scale: float
    residual_scale: float

    @nn.compact
    def __call__(self, x: jax.Array, shortcut: jax.Array, residual: jax.Array) -> Terms:
        """Returns the two terms, scaled."""
        return shortcut * self.skip_scale, residual * self.residual_scale


class Gating(nn.Module):
    """The shortcut is gated by 1 - g(x) (1603.05027, Section 3.1, exclusive and shortcut-only).

    g is a 1x1 convolution with a bias and a sigmoid, as in highway networks; in units that change
    the shape it has the unit's stride and channels.

    Attributes:
      gate_bias: initial, of g: the more negative, the more open the shortcut.
      exclusive: whether F is gated by g.
      conv: constructor of the convolution.
    """

    gate_bias: float
    exclusive: bool
    conv: ModuleDef

    def __call__(self, x: jax.Array, shortcut: jax.Array, residual: jax.Array) -> Terms:
        """Returns the two terms, gated."""
        gate = self.gates(x, shortcut.shape)
        return shortcut * (1 - gate), residual * gate if self.exclusive else residual

    @nn.compact
    def gates(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """g, of a shape [N, H, W, C]."""
        conv = self.conv(
            shape[-1],
            stride=-(-x.shape[1] // shape[1]),
            use_bias=True,
            bias_init=nn.initializers.constant(self.gate_bias),
            name="conv",
        )
        return nn.sigmoid(conv(x))


class ShortcutDropout(nn.Module):
    """Dropout on the shortcut's output (1603.05027, Section 3.1)."""

    train: bool
    rate: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, shortcut: jax.Array, residual: jax.Array) -> Terms:
        """Returns the two terms, the shortcut with holes."""
        return nn.Dropout(self.rate, deterministic=not self.train)(shortcut), residual


# By the name that ResNet's `skip` has (1603.05027, Table 1); None: nothing. 'conv1x1' is the
# shortcut of option C.
SKIPS: dict[str, ModuleDef | None] = {
    "identity": None,
    "constant_scaling": Scaling,
    "exclusive_gating": functools.partial(Gating, exclusive=True),
    "shortcut_gating": functools.partial(Gating, exclusive=False),
    "conv1x1": None,
    "dropout": ShortcutDropout,
}
