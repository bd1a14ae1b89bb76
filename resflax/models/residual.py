"""The residual block, composed along independent axes.

| axis       | what it chooses                              | as                                   |
|------------|----------------------------------------------|--------------------------------------|
| branch     | the convolutions of F in y = x + F(x)        | a tuple of ConvSpec                  |
| shortcut   | how x reaches the sum                        | a constructor: shortcuts.SHORTCUTS   |
| unit       | the order of norm, activation and addition   | a row of UNITS                       |
| gate       | squeeze-excite, say, and where it stands     | a constructor (gates.GATES), a name  |
| skip       | what is done to x and F(x) before the sum    | a constructor: skips.SKIPS           |
| downsample | how the image is halved                      | a row of DOWNSAMPLES                 |

How constructors are called: see models.constructors.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from resflax.errors import UserError
from resflax.models import constructors, layers
from resflax.models.constructors import Choice, ModuleDef
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


class Downsampling(NamedTuple):
    """How a stage halves the image.

    Attributes:
      block: the one that does it: the 'first' of the stage, or the 'last' of the stage before.
      pool: constructor of what stands behind the convolution that would have a stride, and has none
        then; None: the convolution has it.
    """

    block: str = "first"
    pool: ModuleDef | None = None


# By the name that ResNet's `downsample` has: the last one is that of TensorFlow-slim and Keras'
# ResNetV2.
DOWNSAMPLES = {"first": Downsampling("first"), "last": Downsampling("last")}


def downsampling(choice: Choice) -> Downsampling:
    """A row of DOWNSAMPLES, or pooling by a constructor, in the first block."""
    return DOWNSAMPLES[choice] if isinstance(choice, str) else Downsampling(pool=choice)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """What a residual block is made of.

    Attributes:
      branch: the convolutions of F; their strides multiply to the block's stride.
      shortcut: constructor of what gives x the shape of F(x); None: no addition, a plain net.
      unit: a row of UNITS.
      parts: of the network.
      gate: constructor of the gate, or None.
      se_integration: where the gate stands (SE, 1709.01507, Figure 5): 'standard' at the end of
        the branch, 'pre' before it, 'post' after the block, 'identity' on the shortcut, '3x3'
        after the 3x3 convolution of a bottleneck.
      skip: constructor of what is done to the two terms before their sum, or None.
      pool: see Downsampling.
      drop_path: constructor of what leaves the branch out at random, or None.
      projection_kernel: side of the projection's kernel.
      zero_init_last: start as the identity: the last norm's scale, or in pre-activation units the
        last kernel, is zero (Goyal 2017, arXiv 1706.02677, Section 5.1).
      conv_bias: which convolutions have a bias; see `has_bias`.
      activated: whether the stem has done what stands `before` the first convolution.
    """

    branch: Branch
    shortcut: ModuleDef | None
    unit: Unit
    parts: layers.Parts
    gate: ModuleDef | None = None
    se_integration: str = "standard"
    skip: ModuleDef | None = None
    pool: ModuleDef | None = None
    drop_path: ModuleDef | None = None
    projection_kernel: int = 1
    zero_init_last: bool = False
    conv_bias: str = "none"
    activated: bool = False

    def shortcut_says(self, attribute: str, otherwise: bool) -> bool:
        """An attribute of the shortcut's class; see models.shortcuts."""
        return getattr(constructors.made(self.shortcut), attribute, otherwise)


class ResidualBlock(nn.Module):
    """y = shortcut(x) + F(x), with norm, activation and gate where the spec says."""

    spec: BlockSpec

    @nn.compact
    def __call__(self, x: jax.Array, drop_rate: float | jax.Array = 0.0) -> jax.Array:
        """[N, H, W, C], and the rate of `drop_path` -> the shape of the branch's result."""
        spec = self.spec
        stride = math.prod(conv.stride for conv in spec.branch)
        reshapes = stride != 1 or spec.branch[-1].filters != x.shape[-1]

        y: Activations = x
        if not spec.activated:
            y = self._apply(spec.unit.before, "norm1", x)
        # A unit that changes the shape has no identity to keep clean: its shortcut takes the
        # pre-activated input, and costs no second norm (1603.05027, appendix).
        preactivated = reshapes and spec.shortcut_says("preactivated", True)
        source = norm_ops.value(y) if preactivated else x
        y = self._gate("pre", y)
        y = self._branch(y)
        y = self._gate("standard", y)
        if spec.drop_path is not None:
            y = spec.drop_path(name="drop_path")(norm_ops.value(y), drop_rate)
        if spec.shortcut is not None:
            shortcut: Activations = source
            if reshapes or spec.shortcut_says("everywhere", False):
                shortcut = self._shortcut(spec.shortcut, source, stride, norm_ops.shape(y))
            shortcut = self._gate("identity", shortcut)
            if spec.skip is not None:
                shortcut, y = self._skip(spec.skip, source, shortcut, y)
            y = norm_ops.add(shortcut, y)
        y = self._apply(spec.unit.sum, "norm_sum", y)
        return norm_ops.value(self._gate("post", y))

    def _branch(self, y: Activations) -> Activations:
        spec, unit, zeros = self.spec, self.spec.unit, nn.initializers.zeros
        for i, conv in enumerate(spec.branch, 1):
            ends = i == len(spec.branch)
            zero = spec.zero_init_last and ends
            after = unit.last if ends else unit.after
            if i > 1:
                y = self._apply(unit.before, f"norm{i}", y)
            settings = dataclasses.asdict(conv)
            if zero and "norm" not in after:
                settings["kernel_init"] = zeros
            normed = "norm" in (after if ends else after + unit.before)
            settings["use_bias"] = has_bias(spec.conv_bias, normed=normed)
            pool = spec.pool if conv.stride > 1 else None
            if pool is not None:
                settings["stride"] = 1
            y = spec.parts.conv(**settings, name=f"conv{i}")(norm_ops.value(y))
            y = self._apply(after, f"norm{i}", y, **({"scale_init": zeros} if zero else {}))
            if pool is not None:
                y = self._pool(pool, y, conv.stride)
            if i == 2:
                y = self._gate("3x3", y)
        return y

    def _pool(self, pool: ModuleDef, y: Activations, stride: int) -> Activations:
        n, height, width, channels = norm_ops.shape(y)
        module = self.spec.parts.bind(pool, stride=stride)(name="downsample")
        shape = (n, -(-height // stride), -(-width // stride), channels)
        return constructors.apply("downsample", module, y, shape)

    def _apply(self, order: tuple[str, ...], name: str, y: Activations, **of_norm: Any) -> Any:
        for layer in order:
            if layer == "norm":
                norm = self.spec.parts.norm(name=name, **of_norm)
                y = constructors.apply("norm", norm, norm_ops.value(y))
            else:
                y = self.spec.parts.act(y)
        return y

    def _gate(self, place: str, y: Activations) -> Activations:
        gate = self.spec.gate
        if gate is None or self.spec.se_integration != place:
            return y
        label = getattr(constructors.made(gate), "label", "gate")
        return constructors.apply("gate", gate(name=label), y)

    def _shortcut(
        self, shortcut: ModuleDef, x: jax.Array, stride: int, shape: tuple[int, ...]
    ) -> Activations:
        spec = self.spec
        normed = spec.unit.projection_norm
        bias = has_bias(spec.conv_bias, normed=normed)
        constructor = spec.parts.bind(
            shortcut,
            filters=shape[-1],
            stride=stride,
            kernel_size=spec.projection_kernel,
            conv=functools.partial(spec.parts.conv, use_bias=bias),
            norm=spec.parts.norm if normed else layers.Identity,
        )
        return constructors.apply("shortcut", constructor(name="shortcut"), x, shape)

    def _skip(
        self, skip: ModuleDef, x: jax.Array, shortcut: Activations, y: Activations
    ) -> tuple[jax.Array, jax.Array]:
        module = skip(name="skip")
        terms = norm_ops.value(shortcut), norm_ops.value(y)
        given = module(x, *terms)
        if not isinstance(given, tuple) or len(given) != 2:
            raise UserError(
                f"skip {constructors.describe(skip)} must give two arrays: the shortcut's term and "
                "the branch's."
            )
        first, second = (
            constructors.checked("skip", module, term, out, term.shape)
            for term, out in zip(terms, given, strict=True)
        )
        return first, second
