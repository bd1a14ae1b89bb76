"""Gates: what multiplies a block's channels, or its positions, by numbers computed from them.

To add one, write a class and its row in GATES; a class from outside needs no row:
`create_model("resnet50", gate=MyGate)`. How it is called: see models.constructors.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resflax.errors import UserError
from resflax.models.constructors import ModuleDef
from resflax.models.layers import he_normal
from resflax.ops import activation, pool
from resflax.ops import norm as norm_ops
from resflax.ops.norm import Activations, Affine


class Gate(nn.Module):
    """A gate that says what it multiplies by: the base class of those that the analyses find.

    A gate of any other class works in a network; but `analyze excitation`, `units` and `complexity`
    and the roofline do not see that it is one.
    """

    # Under which name a block has it.
    label: ClassVar[str] = "gate"
    deferred: ClassVar[bool] = False

    def gates(self, x: Any) -> jax.Array:
        """What images [N, H, W, C] are multiplied by: [N, C], or the shape of `x`."""
        raise NotImplementedError

    def __call__(self, x: Any) -> Any:
        """[N, H, W, C] -> the same shape, times the gates."""
        return _scaled(x, self.gates(x).astype(x.dtype))


def _scaled(x: jax.Array, gates: jax.Array) -> jax.Array:
    return x * (gates if gates.ndim == x.ndim else gates[:, None, None, :])


class SqueezeExcite(Gate):
    """Channel attention: scales each channel by a gate computed from all channels' means.

    Squeeze-and-Excitation Networks, arXiv 1709.01507, Section 3; its ablations in Section 6.

    Attributes:
      reduction: the first dense layer has C // reduction units (Section 6.1).
      squeeze: 'avg' or 'max' over the positions, or 'none': gates at every position (6.2, 6.5).
      gate: the last non-linearity: 'sigmoid', 'tanh' or 'relu' (6.3).
      bias: whether the dense layers have biases; the released networks have, the ablations not.
      divisor: of the first dense layer's units, which are rounded to a multiple of it; timm has 8.
      dtype: of the scaled activations; the gates are computed in float32.
    """

    label = "se"
    deferred = True

    reduction: int = 16
    squeeze: str = "avg"
    gate: str = "sigmoid"
    bias: bool = True
    divisor: int = 1
    dtype: jnp.dtype = jnp.float32

    def __call__(self, x: Activations) -> Activations:
        """[N, H, W, C] -> the same shape.

        With the squeeze 'avg', what a norm left to be computed stays so; else it is computed here.
        """
        if self.squeeze == "avg" and isinstance(x, Affine) and x.residual is None:
            return x.gated(self.gates(x))
        x = norm_ops.value(x)
        return _scaled(x, self.gates(x).astype(self.dtype))

    @nn.compact
    def gates(self, x: Activations) -> jax.Array:
        """Float32, [N, C]; without a squeeze, the shape of `x`."""
        if isinstance(x, Affine):
            squeezed, channels = x.pooled(), x.x.shape[-1]
        else:
            squeezed, channels = SQUEEZES[self.squeeze](x), x.shape[-1]
        units = gate_units(channels, self.reduction, self.divisor)
        dense = functools.partial(nn.Dense, use_bias=self.bias, kernel_init=he_normal)
        hidden = activation.relu(dense(units, name="squeeze")(squeezed))
        return SIGMOIDS[self.gate](dense(channels, name="excite")(hidden))


def gate_units(channels: int, reduction: int, divisor: int) -> int:
    """Units of a gate's first layer: C // reduction, or the multiple of `divisor` nearest to it.

    Halves are rounded up, and what would be nothing becomes `divisor`, as in timm.
    """
    if divisor == 1:
        return channels // reduction
    return max(divisor, int(channels / reduction + divisor / 2) // divisor * divisor)


class GatherExcite(Gate):
    """Gates from the means of a neighbourhood, or from what is learned of it, for each channel.

    Gather-Excite, arXiv 1810.12348: GE-theta-minus (Section 3.1), and GE-theta (Section 3.2) with
    `learned`. The gates of a neighbourhood are those of all its positions (nearest neighbours).

    Attributes:
      extent: of the neighbourhood, a power of 2: means of 2 * extent - 1 pixels at every extent-th;
        0: the whole map.
      learned: whether the gather is by depthwise convolutions with norms: of stride 2 until the
        extent is reached, or one of the size of the map, which then cannot change.
      conv, norm, act: of the network.
    """

    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[jax.Array], jax.Array]
    extent: int = 0
    learned: bool = False

    @nn.compact
    def gates(self, x: jax.Array) -> jax.Array:
        """[N, C] where the extent is the whole map, else the shape of `x`."""
        if self.extent == 1 or self.extent & (self.extent - 1):
            raise UserError(f"extent {self.extent} must be 0 (the whole map) or 2, 4, 8, ...")
        if self.learned:
            y = self._gathered(x)
        elif self.extent:
            window, padding = 2 * self.extent - 1, self.extent - 1
            full = x.astype(jnp.float32)
            y = pool.avg_pool(full, window, self.extent, padding, count_padding=False)
        else:
            y = pool.global_avg_pool(x)[:, None, None]
        if not self.extent:
            return nn.sigmoid(y[:, 0, 0])
        rows, columns = (np.arange(x.shape[i]) * y.shape[i] // x.shape[i] for i in (1, 2))
        return nn.sigmoid(y)[:, rows][:, :, columns]

    def _gathered(self, y: jax.Array) -> jax.Array:
        conv = functools.partial(self.conv, y.shape[-1], groups=y.shape[-1])
        if not self.extent:
            y = conv(kernel_size=y.shape[1:3], padding=(0, 0), name="conv1")(y)
            return self.norm(name="norm1")(y)
        halvings = self.extent.bit_length() - 1
        for i in range(1, halvings + 1):
            y = conv(kernel_size=3, stride=2, name=f"conv{i}")(y)
            y = self.norm(name=f"norm{i}")(y)
            y = self.act(y) if i < halvings else y
        return y


# By the name that ResNet's `gate` has. Other extents: functools.partial(GatherExcite, extent=4).
GATES: dict[str, ModuleDef] = {
    "se": SqueezeExcite,
    "ge": functools.partial(GatherExcite, learned=True),
    "ge_minus": GatherExcite,
}

SQUEEZES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "avg": pool.global_avg_pool,
    "max": pool.global_max_pool,
    "none": lambda x: x.astype(jnp.float32),
}

# The last non-linearities of squeeze-excite.
SIGMOIDS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
    "relu": activation.relu,
}
