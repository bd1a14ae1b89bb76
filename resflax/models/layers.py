"""The layers that every network is made of, with the parameters that `resflax.ops` computes on."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from resflax.models import constructors
from resflax.models.constructors import Choice, ModuleDef
from resflax.ops import conv as conv_ops
from resflax.ops import norm as norm_ops
from resflax.ops.norm import Activations, Affine

# N(0, 2 / (k * k * C_out)), untruncated, the total C_out also where the convolution is grouped:
# the initialisation of the residual nets' released code (He 2015, arXiv 1502.01852, backward case).
he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

# U(-1/sqrt(C_in), 1/sqrt(C_in)): the classifier's weights in the Torch code of the papers.
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Conv(nn.Module):
    """Convolution, padded symmetrically: to the same size for odd kernels, as in PyTorch.

    TensorFlow's 'SAME' pads strided windows unevenly on even sizes, so it sees other pixels.

    Attributes:
      filters: output channels.
      kernel_size: side of the kernel, or its height and width, pixels.
      stride: step of the window, pixels.
      groups: the cardinality.
      padding: zeros before and after each row's and column's end: (height, width); None: half
        the kernel.
      use_bias: whether a bias is added.
      bias_init: of that bias.
      paths: convolutions that it is computed as; see ops.conv.conv2d_by_paths.
      add_paths: whether their results are added up.
      kernel_init: of the float32 kernel, [k_h, k_w, C_in / groups, filters].
      dtype: of the computation.
    """

    filters: int
    kernel_size: int | tuple[int, int] = 1
    stride: int = 1
    groups: int = 1
    padding: tuple[int, int] | None = None
    use_bias: bool = False
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    paths: int = 1
    add_paths: bool = False
    kernel_init: nn.initializers.Initializer = he_normal
    dtype: jnp.dtype = jnp.float32

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the kernel."""
        size = self.kernel_size
        return (size, size) if isinstance(size, int) else size

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H', W', filters]; unpadded and strided sizes are rounded down."""
        shape = (*self.window, x.shape[-1] // self.groups, self.filters)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        padding = self.padding if self.padding is not None else [k // 2 for k in self.window]
        convolve = conv_ops.conv2d
        if self.paths > 1:
            convolve = functools.partial(
                conv_ops.conv2d_by_paths, paths=self.paths, add=self.add_paths
            )
        y = convolve(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            padding=[(p, p) for p in padding],
            groups=self.groups,
        )
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.filters,), jnp.float32)
            y += bias.astype(self.dtype).reshape(1, 1, 1, -1)
        return y


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a network hands down to its parts: the constructors of its layers, and its mode."""

    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Activations], jax.Array]
    train: bool
    dtype: jnp.dtype

    def bind(self, constructor: ModuleDef, **settings: Any) -> ModuleDef:
        """A constructor with what it has fields for, of these and of the settings given."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return constructors.bind(constructor, **(own | settings))


def norm(
    kind: Choice,
    *,
    train: bool,
    momentum: float,
    epsilon: float,
    axis_name: str | None,
    dtype: jnp.dtype,
) -> ModuleDef:
    """The constructor of a network's norm layers.

    A norm is called with `name`; the last of a branch that starts as zero with `scale_init` too. It
    has a field for what it needs of the arguments, and of `use_running_average`, which is the
    opposite of `train`. Only batch norms, which have that field, are told the axis.

    Args:
      kind: a name in NORMS, or a constructor, such as flax.linen.LayerNorm.
      train: whether batch norm uses and updates the batch's statistics.
      momentum: share of the old running statistics that a step keeps.
      epsilon: added to the variance.
      axis_name: the mapped axis over which batch norm averages; None: none.
      dtype: of the result.
    """
    constructor = constructors.chosen(kind, NORMS)
    settings = {"train": train, "momentum": momentum, "epsilon": epsilon, "dtype": dtype}
    if "use_running_average" in constructors.declared(constructor):
        settings |= {"use_running_average": not train, "axis_name": axis_name}
    return constructors.bind(constructor, **settings)


def act(choice: Choice) -> Callable[[Activations], jax.Array]:
    """The activation of a name in ACTIVATIONS, or a function of arrays."""
    if isinstance(choice, str):
        return ACTIVATIONS[choice]
    return functools.partial(_of_array, choice)


def _of_array(function: Callable[[jax.Array], jax.Array], y: Activations) -> jax.Array:
    x = norm_ops.value(y)
    return constructors.checked("act", function, x, function(x), x.shape)


def is_product(module: nn.Module) -> bool:
    """Whether it is a convolution or a dense layer, ours or flax's: what multiply-adds are of."""
    return isinstance(module, Conv | nn.Conv | nn.Dense)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm, ours or flax's; of one within another, the outer one."""
    kinds = BatchNorm | GroupNorm | nn.BatchNorm | nn.GroupNorm | nn.LayerNorm
    return isinstance(module, kinds) and not isinstance(module.parent, GroupNorm)


class BatchNorm(nn.Module):
    """Batch normalisation (arXiv 1502.03167), left to be computed with what follows it.

    Variables: 'params': scale and bias; 'batch_stats': mean and var, running averages of the
    batches' (whose variance is the biased one), float32. The names are those of flax.linen.

    Attributes:
      use_running_average: whether to normalise by the running averages, and leave them.
      momentum: share of the running averages that a batch leaves.
      epsilon: added to the variance.
      axis_name: the mapped axis over which the batch's statistics are averaged; None: none.
      use_scale: whether there is a scale.
      scale_init: of it.
      dtype: of the result.
      computed: whether the result is computed at once, an array.
    """

    deferred: ClassVar[bool] = True

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    use_scale: bool = True
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    dtype: jnp.dtype = jnp.float32
    computed: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> Activations:
        """[N, H, W, C] -> the normalised images, scaled and shifted, to be computed if not now."""
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        x = x.astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        if self.use_running_average:
            means, batch_mean, batch_var = None, mean.value, var.value
        else:
            x, means, squares = norm_ops.moments(x)
            axis_name = None if self.is_initializing() else self.axis_name
            batch_mean, batch_var = _statistics(means, squares, axis_name)
            if not self.is_initializing():
                mean.value = _average(mean.value, batch_mean, self.momentum)
                var.value = _average(var.value, batch_var, self.momentum)
        scale = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, shape, jnp.float32)
        factor, shift = _coefficients(batch_mean, batch_var, scale, bias, self.epsilon)
        y = Affine(x, factor, shift, means)
        return norm_ops.value(y) if self.computed else y


# Compiled apart, so that they are traced once for all layers of as many channels, which takes a
# fifth of the time from a network's tracing. XLA sees no difference.


@functools.partial(jax.jit, static_argnums=2)
def _statistics(
    means: jax.Array, squares: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """The batch's mean and variance of each channel, of those of its images and their squares."""
    mean, square = jnp.mean(means, axis=0), jnp.mean(squares, axis=0)
    if axis_name is not None:
        mean, square = lax.pmean((mean, square), axis_name)
    variance = square - jnp.square(mean)
    # Rounding may leave less than nothing. Not jnp.maximum, which may lose NaN.
    return mean, jnp.where(variance < 0, 0.0, variance)


@functools.partial(jax.jit, static_argnums=2)
def _average(running: jax.Array, new: jax.Array, momentum: float) -> jax.Array:
    return momentum * running + (1 - momentum) * new


@functools.partial(jax.jit, static_argnums=4)
def _coefficients(
    mean: jax.Array, var: jax.Array, scale: jax.Array | None, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """What images are multiplied by, and what is added, [1, C] each."""
    factor = lax.rsqrt(var + epsilon)
    if scale is not None:
        factor *= scale
    return factor[None], (bias - mean * factor)[None]


class GroupNorm(nn.Module):
    """Group normalisation (arXiv 1803.08494) with the scale under the name that batch norm has.

    Attributes:
      epsilon: added to the variance.
      dtype: of the result.
      scale_init: of the scale.
    """

    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> the same shape."""
        groups = math.gcd(32, x.shape[-1])
        norm = nn.GroupNorm(
            groups, epsilon=self.epsilon, dtype=self.dtype, scale_init=self.scale_init, name="group"
        )
        return norm(x)


class Identity(nn.Module):
    """Nothing, in the place of a norm."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x."""
        return x


# By the name that a network's `norm` has: 'group' has 32 groups, or the most that divide the
# channels.
NORMS: dict[str, ModuleDef] = {"batch": BatchNorm, "group": GroupNorm, "none": Identity}

# What stands between the layers, by the name that ResNet's `act` has; of arrays and of what a norm
# left to be computed. The papers use ReLU.
ACTIVATIONS: dict[str, Callable[[Activations], jax.Array]] = {
    "relu": norm_ops.relu,
    "sigmoid": lambda y: nn.sigmoid(norm_ops.value(y)),
    "tanh": lambda y: nn.tanh(norm_ops.value(y)),
    "leaky_relu": lambda y: nn.leaky_relu(norm_ops.value(y)),
    "silu": lambda y: nn.silu(norm_ops.value(y)),
}

# Initialisations of the convolutions' kernels, by the name that a network's `kernel_init` has.
INITS: dict[str, nn.initializers.Initializer] = {
    "he_fan_out": he_normal,
    "he_fan_in": nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
    "glorot": nn.initializers.variance_scaling(1.0, "fan_avg", "normal"),
    "lecun": nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
    "gaussian": nn.initializers.normal(0.01),
}


def initialiser(choice: Choice) -> nn.initializers.Initializer:
    """That of a name in INITS, or one of flax."""
    return constructors.chosen(choice, INITS)
