"""The residual block, composed along independent axes.

| axis     | what it chooses                              | as                                     |
|----------|----------------------------------------------|----------------------------------------|
| branch   | the convolutions of F in y = x + F(x)        | a tuple of ConvSpec                    |
| shortcut | how x reaches the sum: 'A', 'B', 'C', 'none' | a name                                 |
| unit     | the order of norm, activation and addition   | a row of UNITS                         |
| gate     | squeeze-excite, and where it stands          | a module constructor and a name        |
| skip     | what is done to x and F(x) before the sum    | a module constructor                   |
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from resflax.errors import UserError
from resflax.models.layers import ModuleDef
from resflax.ops import norm as norm_ops
from resflax.ops.norm import Activations


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """One convolution of a branch: see layers.Conv."""

    filters: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    paths: int = 1
    add_paths: bool = False


Branch = tuple[ConvSpec, ...]

# The shortcut's and the branch's term of the sum.
Terms = tuple[jax.Array, jax.Array]


def basic(filters: int, stride: int = 1) -> Branch:
    """Two 3x3 convolutions (He 2015, arXiv 1512.03385, Figure 5, left)."""
    return ConvSpec(filters, 3, stride), ConvSpec(filters, 3)


def bottleneck(
    filters: int,
    stride: int = 1,
    *,
    cardinality: int = 1,
    base_width: int = 64,
    stride_in: str = "3x3",
    halve_first: bool = False,
    form: str = "c",
) -> Branch:
    """1x1, 3x3, 1x1 convolutions (He 2015, Figure 5, right; ResNeXt, 1611.05431, Figure 3).

    Args:
      filters: a quarter of the output channels.
      stride: of the block.
      cardinality: groups of the 3x3 convolution.
      base_width: channels of each group where `filters` is 64; in proportion elsewhere.
      stride_in: which convolution has the stride: '1x1' (the first; He's papers and Caffe) or
        '3x3' (Torch, torchvision, ResNeXt).
      halve_first: half as many channels out of the first convolution (SENet-154; SE, 1709.01507,
        appendix).
      form: which of the three equal forms of the figure is computed: 'a' (paths that are added
        up), 'b' (paths that are concatenated) or 'c' (grouped). Norms and activations act on each
        channel alone, so that they are the same for paths apart and together.

    Raises:
      UserError: if the width comes out as nothing, or cannot be halved.
    """
    width = int(filters * base_width / 64) * cardinality
    first = width // 2 if halve_first else width
    if not first:
        channels = 2 if halve_first and cardinality == 1 else 1
        raise UserError(
            f"base_width {base_width} leaves a block of {filters} filters without channels; "
            f"it must be at least {-(-64 * channels // filters)}."
        )
    strides = {"1x1": (stride, 1), "3x3": (1, stride)}[stride_in]
    paths = 1 if form == "c" else cardinality
    added = cardinality if form == "a" else 1
    return (
        ConvSpec(first, 1, strides[0], paths=paths),
        ConvSpec(width, 3, strides[1], cardinality, paths=paths),
        ConvSpec(4 * filters, 1, paths=added, add_paths=added > 1),
    )


@dataclasses.dataclass(frozen=True)
class Unit:
    """Where norm and activation stand (Identity Mappings, arXiv 1603.05027, Figure 4).

    Each field is a sequence of 'norm' and 'act': `before` every convolution, `after` every one but
    the last, after the `last`, after the `sum`. What stands `before` the first convolution of the
    first block is done by the stem unless the network says otherwise, and once more after the last
    block (appendix of the paper).
    """

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    sum: tuple[str, ...] = ()
    projection_norm: bool = True


UNITS: dict[str, Unit] = {
    "original": Unit(after=("norm", "act"), last=("norm",), sum=("act",)),
    "bn_after_addition": Unit(after=("norm", "act"), sum=("norm", "act")),
    "relu_before_addition": Unit(after=("norm", "act"), last=("norm", "act")),
    "relu_only_preact": Unit(before=("act",), after=("norm",), last=("norm",)),
    "full_preact": Unit(before=("norm", "act"), projection_norm=False),
    # Of no paper: the basic blocks with which timm's legacy SE-ResNet-18 and 34 were trained.
    "relu_around_addition": Unit(after=("norm", "act"), last=("norm", "act"), sum=("act",)),
}


def has_bias(conv_bias: str, *, normed: bool) -> bool:
    """Whether a convolution has a bias.

    Args:
      conv_bias: 'none', 'all', or 'unnormed': of those that no norm follows.
      normed: whether a norm follows this one.
    """
    return conv_bias == "all" or (conv_bias == "unnormed" and not normed)


class Projection(nn.Module):
    """A convolution that gives the shortcut the shape of the branch (He 2015, options B and C)."""

    filters: int
    kernel_size: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef | None

    @nn.compact
    def __call__(self, x: jax.Array) -> Activations:
        """[N, H, W, C] -> [N, ceil(H / stride), ceil(W / stride), filters]."""
        x = self.conv(self.filters, self.kernel_size, self.stride, name="conv")(x)
        return x if self.norm is None else self.norm(name="norm")(x)


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
      bias: initial, of g: the more negative, the more open the shortcut.
      exclusive: whether F is gated by g.
      conv: constructor of the convolution.
    """

    bias: float
    exclusive: bool
    conv: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array, shortcut: jax.Array, residual: jax.Array) -> Terms:
        """Returns the two terms, gated."""
        stride = -(-x.shape[1] // shortcut.shape[1])
        conv = self.conv(
            shortcut.shape[-1],
            stride=stride,
            use_bias=True,
            bias_init=nn.initializers.constant(self.bias),
            name="conv",
        )
        gate = nn.sigmoid(conv(x))
        return shortcut * (1 - gate), residual * gate if self.exclusive else residual


class ShortcutDropout(nn.Module):
    """Dropout on the shortcut's output (1603.05027, Section 3.1)."""

    train: bool
    rate: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array, shortcut: jax.Array, residual: jax.Array) -> Terms:
        """Returns the two terms, the shortcut with holes."""
        return nn.Dropout(self.rate, deterministic=not self.train)(shortcut), residual


class DropPath(nn.Module):
    """Stochastic depth (Huang 2016, arXiv 1603.09382): the residual branch is left out at random.

    Attributes:
      mode: 'batch': one draw for all images of a device, nothing rescaled in training, and times
        1 - rate in evaluation, as published; 'sample': a draw for each image, those kept divided
        by 1 - rate in training, as became usual. The branch is computed all the same, so its
        running statistics move also where it is left out.
      train: whether anything is left out.
    """

    mode: str
    train: bool

    @nn.compact
    def __call__(self, y: jax.Array, rate: float | jax.Array) -> jax.Array:
        """[N, H, W, C], and the probability of leaving it out -> the same shape."""
        keep = jnp.asarray(1.0 - rate, y.dtype)
        if not self.train:
            return y * keep if self.mode == "batch" else y
        shape = (1 if self.mode == "batch" else y.shape[0], 1, 1, 1)
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - rate, shape).astype(y.dtype)
        return y * kept if self.mode == "batch" else y * kept / keep


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


class ResidualBlock(nn.Module):
    """y = shortcut(x) + F(x), with norm, activation and gate where `unit` and the gate say.

    Attributes:
      branch: the convolutions of F; their strides multiply to the block's stride.
      shortcut: 'A' (zero-padded identity), 'B' (projection where the shape changes), 'C'
        (projection everywhere), 'none' (no addition: a plain net), 'subsample' (the identity, of
        every stride-th pixel: what an A of as many channels is).
      unit: a row of UNITS.
      conv, norm, act: constructors of the layers, with dtype, mode and axis bound.
      gate: constructor of the squeeze-excite layer, or None.
      se_integration: where the gate stands (SE, 1709.01507, Figure 5): 'standard' at the end of
        the branch, 'pre' before it, 'post' after the block, 'identity' on the shortcut, '3x3'
        after the 3x3 convolution of a bottleneck.
      skip: constructor of what is done to the two terms before their sum, or None.
      drop_path: constructor of what leaves the branch out at random, or None.
      projection_kernel: side of the projection's kernel.
      zero_init_last: start as the identity: the last norm's scale, or in pre-activation units the
        last kernel, is zero (Goyal 2017, arXiv 1706.02677, Section 5.1).
      conv_bias: which convolutions have a bias; see `has_bias`.
      activated: whether the stem has done what stands `before` the first convolution.
    """

    branch: Branch
    shortcut: str
    unit: Unit
    conv: ModuleDef
    norm: ModuleDef
    act: Callable[[Activations], jax.Array] = norm_ops.relu
    gate: ModuleDef | None = None
    se_integration: str = "standard"
    skip: ModuleDef | None = None
    drop_path: ModuleDef | None = None
    projection_kernel: int = 1
    zero_init_last: bool = False
    conv_bias: str = "none"
    activated: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, drop_rate: float | jax.Array = 0.0) -> jax.Array:
        """[N, H, W, C], and the rate of `drop_path` -> the shape of the branch's result."""
        stride = math.prod(spec.stride for spec in self.branch)
        filters = self.branch[-1].filters
        reshapes = stride != 1 or filters != x.shape[-1]

        y: Activations = x
        if not self.activated:
            y = self._apply(self.unit.before, "norm1", x)
        # A unit that changes the shape has no identity to keep clean: its shortcut takes the
        # pre-activated input, and costs no second norm (1603.05027, appendix).
        source = norm_ops.value(y) if reshapes and self.shortcut != "subsample" else x
        y = self._gate("pre", y)
        y = self._branch(y)
        y = self._gate("standard", y)
        if self.drop_path is not None:
            y = self.drop_path(name="drop_path")(norm_ops.value(y), drop_rate)
        if self.shortcut != "none":
            shortcut = self._gate("identity", self._shortcut(source, filters, stride, reshapes))
            if self.skip is not None:
                terms = norm_ops.value(shortcut), norm_ops.value(y)
                shortcut, y = self.skip(name="skip")(source, *terms)
            y = norm_ops.add(shortcut, y)
        y = self._apply(self.unit.sum, "norm_sum", y)
        return norm_ops.value(self._gate("post", y))

    def _branch(self, y: Activations) -> Activations:
        zeros = nn.initializers.zeros
        for i, spec in enumerate(self.branch, 1):
            ends = i == len(self.branch)
            zero = self.zero_init_last and ends
            after = self.unit.last if ends else self.unit.after
            if i > 1:
                y = self._apply(self.unit.before, f"norm{i}", y)
            settings = dataclasses.asdict(spec)
            if zero and "norm" not in after:
                settings["kernel_init"] = zeros
            normed = "norm" in (after if ends else after + self.unit.before)
            settings["use_bias"] = has_bias(self.conv_bias, normed=normed)
            y = self.conv(**settings, name=f"conv{i}")(norm_ops.value(y))
            y = self._apply(after, f"norm{i}", y, **({"scale_init": zeros} if zero else {}))
            if i == 2:
                y = self._gate("3x3", y)
        return y

    def _apply(
        self, layers: tuple[str, ...], name: str, y: Activations, **norm_kwargs
    ) -> Activations:
        for layer in layers:
            if layer == "norm":
                y = self.norm(name=name, **norm_kwargs)(norm_ops.value(y))
            else:
                y = self.act(y)
        return y

    def _gate(self, place: str, y: Activations) -> Activations:
        if self.gate is None or self.se_integration != place:
            return y
        return self.gate(name="se")(y)

    def _shortcut(self, x: jax.Array, filters: int, stride: int, reshapes: bool) -> Activations:
        if self.shortcut == "C" or (self.shortcut == "B" and reshapes):
            norm = self.norm if self.unit.projection_norm else None
            bias = has_bias(self.conv_bias, normed=norm is not None)
            conv = functools.partial(self.conv, use_bias=bias)
            kernel_size = self.projection_kernel
            return Projection(filters, kernel_size, stride, conv, norm, name="shortcut")(x)
        return zero_padded_identity(x, filters, stride) if reshapes else x
