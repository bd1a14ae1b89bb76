"""ResNet v1 and v2, plain nets, ResNeXt, SE-ResNet, SE-ResNeXt and SENet-154.

All of them are one network, `ResNet`, with arguments; `resnet` and `cifar_resnet` choose the stage
sizes for a depth, on ImageNet and on CIFAR. Stages are numbered as in the papers' tables: the stem
is stage 1, conv2_x is stage 2.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resflax.errors import UserError
from resflax.models import axes, checks, constructors, gates, layers, repeat, residual
from resflax.models.constructors import Choice, ModuleDef
from resflax.models.layers import Parts
from resflax.models.shortcuts import SHORTCUTS, Subsample
from resflax.models.skips import SKIPS
from resflax.models.stem import POOLS, STEMS
from resflax.ops import norm as norm_ops
from resflax.ops import pool
from resflax.ops.norm import Activations


class ResNet(nn.Module):
    """A residual network, from images to logits.

    A field that is a name of a table can be a constructor as well: see models.constructors.

    Variables: 'params' and, for the running means and variances, 'batch_stats'; random numbers:
    'dropout' where `dropout` is not zero and `train` is true.

    Attributes:
      stage_sizes: blocks in each stage. The first block of every stage but the first halves the
        image; filters double from stage to stage.
      num_classes: units of the classifier.
      block: 'basic' or 'bottleneck'.
      num_filters: of the first stage; a bottleneck block gives out four times as many.
      stem_filters: of the stem; None: as many as in the first stage.
      stem: a name in stem.STEMS: 'imagenet' (7x7/2, then 3x3/2 max-pool), 'cifar' (3x3, no pool) or
        'deep' (three 3x3, then a 3x3/2 max-pool; SENet-154); or a constructor.
      stem_pool: padding of the stem's pool: 'symmetric' (one pixel on every side, as in PyTorch),
        'ceil' (none before and one after, as in Caffe, so that sizes are rounded up), 'zeros' (one
        pixel of zeros on every side, as in Keras).
      any_size: whether images are taken that the stem was not made for: smaller than 64 pixels
        for 'imagenet' and 'deep', larger than 128 for 'cifar'.
      cardinality: groups of the 3x3 convolutions of bottleneck blocks (ResNeXt, 1611.05431).
      base_width: channels of a group where a block has 64 filters; in proportion elsewhere.
      stride_in: the convolution of a bottleneck that has the stride: '1x1' or '3x3'.
      downsample: a name in residual.DOWNSAMPLES, of the block that halves the image: the stage's
        'first' one, or the 'last' one of the stage before, as in TensorFlow-slim and Keras'
        ResNetV2; or a constructor of a pool, which stands in the first one behind the convolution
        (its norm, its activation) that would have a stride.
      halve_first: half the width out of a bottleneck's first convolution (SENet-154).
      form: which of the equal forms of a ResNeXt block is computed, 'a', 'b' or 'c'; see
        residual.bottleneck.
      shortcut: a name in shortcuts.SHORTCUTS: 'A' (zero-padded identity), 'B' (projection where the
        shape changes), 'C' (projection everywhere), 'D' (as B, of means of 2x2 pixels), 'none' (no
        addition: a plain net); or a constructor.
      projection_kernel: side of the projections' kernels, from stage 3 on (stage 2: always 1).
      unit: order of norm, activation and addition; a name in residual.UNITS.
      first_act: where the first unit's norm and activation stand, if it begins with them: in the
        'stem', before the pool (1603.05027, appendix), or in the 'block' (TensorFlow-slim, timm,
        Keras).
      skip: what is done on the identity path, a name in skips.SKIPS (1603.05027, Table 1):
        'identity', 'constant_scaling' (by skip_scale, and F by residual_scale), 'exclusive_gating',
        'shortcut_gating' (gate_bias: the gates' initial bias), 'conv1x1' (option C), 'dropout'; or
        a constructor.
      skip_scale, residual_scale, gate_bias: of `skip`.
      drop_path: probability that the last block's branch is left out in training; it grows
        linearly from the first block on. See residual.DropPath.
      drop_path_mode: 'batch', the l-th of L blocks at l / L of it (1603.09382, Section 3), or
        'sample', at (l - 1) / (L - 1) of it.
      gate: a name in gates.GATES, or a constructor; None: 'se' where `se_reduction` is not 0.
      se_reduction: of the squeeze-excite gates; 0: there are none.
      se_squeeze, se_gate, se_bias, se_divisor: see gates.SqueezeExcite.
      se_stages: the stages that have gates of whatever kind, 2 to 5; None: all.
      se_integration: where the gate stands in the block; see residual.BlockSpec.
      zero_init_last: every residual branch starts as zero.
      dropout: rate before the classifier.
      act: the activation; a name in layers.ACTIVATIONS, or a function of an array.
      norm: a name in layers.NORMS, 'batch', 'group' or 'none'; or a constructor.
      conv_bias: the convolutions that have biases: 'none', 'all', or those that no norm follows,
        'unnormed'; None: 'all' without norms, else 'none'.
      kernel_init: of the convolutions' kernels; a name in layers.INITS, or a flax initialiser.
      bn_momentum: share of the old running statistics that a training step keeps.
      bn_epsilon: added to the variance.
      axis_name: the mapped axis over which batch norm averages its statistics; None: none.
      scan: equal blocks in a row that run as one loop if they are at least so many; 0: none do.
        What happens inside such blocks cannot be seen from outside; see models.repeat.
      packed: whether the variables of such blocks are stacked under one name: see `loops`.
      remat: whether the backward pass computes each block's activations again: less memory for a
        third more time.
      dtype: of the computation. Parameters, statistics and logits are float32.
    """

    stage_sizes: Sequence[int]
    num_classes: int = 1000
    block: str = "bottleneck"
    num_filters: int = 64
    stem_filters: int | None = None
    stem: Choice = "imagenet"
    stem_pool: str = "symmetric"
    any_size: bool = False
    cardinality: int = 1
    base_width: int = 64
    stride_in: str = "3x3"
    downsample: Choice = "first"
    halve_first: bool = False
    form: str = "c"
    shortcut: Choice = "B"
    projection_kernel: int = 1
    unit: str = "original"
    first_act: str = "stem"
    skip: Choice = "identity"
    skip_scale: float = 1.0
    residual_scale: float = 1.0
    gate_bias: float = 0.0
    drop_path: float = 0.0
    drop_path_mode: str = "batch"
    gate: Choice | None = None
    se_reduction: int = 0
    se_squeeze: str = "avg"
    se_gate: str = "sigmoid"
    se_bias: bool = True
    se_divisor: int = 1
    se_stages: Sequence[int] | None = None
    se_integration: str = "standard"
    zero_init_last: bool = False
    dropout: float = 0.0
    act: Choice = "relu"
    norm: Choice = "batch"
    conv_bias: str | None = None
    kernel_init: Choice = "he_fan_out"
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    axis_name: str | None = None
    scan: int = 16
    packed: bool = False
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, features: bool = False
    ) -> jax.Array | dict[str, jax.Array]:
        """Computes logits.

        Args:
          images: float [N, H, W, C], normalised.
          train: whether batch norm uses and updates the batch's statistics, and dropout drops.
          features: whether to return what comes out of every part of the network.

        Returns:
          float32 [N, num_classes]; with `features`, that and the maps before it by name: 'stem',
          'stage2' to 'stage5' [N, H', W', C'], 'pooled' [N, C], 'logits'.

        Raises:
          UserError: if `images` has not four axes, or is not of a size for the stem.
        """
        self._check_images(images)
        parts = self._parts(train)
        x = self._stem(parts, images)
        outputs = {"stem": x}
        for stage, size in enumerate(self.stage_sizes, start=2):
            for numbers in self._equal_blocks(stage, size):
                x = self._run(stage, numbers, parts, x)
            outputs[f"stage{stage}"] = x
        y: Activations = x
        for layer in residual.UNITS[self.unit].before:
            if layer == "norm":
                y = constructors.apply("norm", parts.norm(name="norm"), norm_ops.value(y))
            else:
                y = parts.act(y)
        x = outputs["pooled"] = pool.global_avg_pool(norm_ops.value(y))
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        head = nn.Dense(self.num_classes, kernel_init=layers.torch_uniform, name="head")
        outputs["logits"] = head(x)
        return outputs if features else outputs["logits"]

    def branch(self, stage: int, stride: int) -> residual.Branch:
        """The convolutions of a block in a stage."""
        filters = self.num_filters * 2 ** (stage - 2)
        if self.block == "basic":
            return residual.basic(filters, stride)
        return residual.bottleneck(
            filters,
            stride,
            cardinality=self.cardinality,
            base_width=self.base_width,
            stride_in=self.stride_in,
            halve_first=self.halve_first,
            form=self.form,
        )

    def drop_rate(self, stage: int, number: int) -> float:
        """The rate of stochastic depth in a block, of those of the stage counted from 1."""
        blocks = sum(self.stage_sizes)
        number += sum(self.stage_sizes[: stage - 2])
        if self.drop_path_mode == "batch":
            return self.drop_path * number / blocks
        return self.drop_path * (number - 1) / max(1, blocks - 1)

    @property
    def drop_rates(self) -> dict[str, float]:
        """The rates of stochastic depth by the names of the blocks; empty without it."""
        stages = enumerate(self.stage_sizes, start=2) if self.drop_path else ()
        return {
            _name(stage, number): self.drop_rate(stage, number)
            for stage, size in stages
            for number in range(1, size + 1)
        }

    @property
    def loops(self) -> repeat.Loops:
        """The blocks whose variables are packed."""
        return tuple(
            tuple(_name(stage, number) for number in numbers)
            for stage, size in enumerate(self.stage_sizes, start=2)
            for numbers in self._equal_blocks(stage, size)
            if self.packed and self._loops(numbers)
        )

    def _loops(self, numbers: range) -> bool:
        return 1 < len(numbers) >= self.scan > 0

    def _parts(self, train: bool) -> Parts:
        init = layers.initialiser(self.kernel_init)
        conv = functools.partial(layers.Conv, kernel_init=init, dtype=self.dtype)
        norm = layers.norm(
            self.norm,
            train=train,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        return Parts(conv, norm, layers.act(self.act), train, self.dtype)

    def _stem(self, parts: Parts, images: jax.Array) -> jax.Array:
        # What the first block begins with, the stem does not do, or the other way round.
        left = residual.UNITS[self.unit].before if self.first_act == "block" else ()
        constructor = parts.bind(
            constructors.chosen(self.stem, STEMS),
            filters=self.stem_filters or self.num_filters,
            pool=POOLS[self.stem_pool],
            last=tuple(layer for layer in ("norm", "act") if layer not in left),
            conv_bias=self._conv_bias,
        )
        stem = constructor(name="stem")
        x = stem(images)
        if isinstance(self.stem, str):
            return x
        return constructors.checked("stem", stem, images.astype(self.dtype), x, None)

    @property
    def _conv_bias(self) -> str:
        return self.conv_bias or ("all" if self.norm == "none" else "none")

    def _equal_blocks(self, stage: int, size: int) -> Iterator[range]:
        """The blocks of a stage, counted from 1, in ranges of equal ones."""
        last = size + 1 if size == 1 or self._stride(stage, size) == 1 else size
        yield range(1, 2)
        yield range(2, last)
        yield range(last, size + 1)

    def _stride(self, stage: int, number: int) -> int:
        """Of a block, of those of the stage counted from 1."""
        if residual.downsampling(self.downsample).block == "first":
            return 2 if number == 1 and stage > 2 else 1
        before_another = stage <= len(self.stage_sizes)
        return 2 if number == self.stage_sizes[stage - 2] and before_another else 1

    def _run(self, stage: int, numbers: range, parts: Parts, x: jax.Array) -> jax.Array:
        """Applies equal blocks of a stage."""
        if not numbers:
            return x
        names = [_name(stage, number) for number in numbers]
        loops = self._loops(numbers)
        block = functools.partial(self._block, self._block_spec(stage, numbers[0], parts))
        if len(numbers) > 1 and self.is_initializing():
            repeat.create(self, block(parent=None), names, x, packed=self.packed and loops)
        rates = [self.drop_rate(stage, number) for number in numbers]
        if loops:
            rows = jnp.asarray(rates)
            return repeat.loop(self, block(parent=None), names, x, rows, packed=self.packed)
        for name, rate in zip(names, rates, strict=True):
            x = block(name=name)(x, rate)
        return x

    def _block(self, spec: residual.BlockSpec, **owner: Any) -> residual.ResidualBlock:
        constructor = nn.remat(residual.ResidualBlock) if self.remat else residual.ResidualBlock
        return constructor(spec, **owner)

    def _block_spec(self, stage: int, number: int, parts: Parts) -> residual.BlockSpec:
        """Of a block of a stage, equal to the others of its range but for its name."""
        stride = self._stride(stage, number)
        drop_path = functools.partial(residual.DropPath, self.drop_path_mode, parts.train)
        return residual.BlockSpec(
            self.branch(stage, stride),
            self._shortcut(subsamples=stride > 1 and number > 1),
            residual.UNITS[self.unit],
            parts,
            gate=self._gate(stage, parts),
            se_integration=self.se_integration,
            skip=self._skip(parts),
            pool=residual.downsampling(self.downsample).pool,
            drop_path=drop_path if self.drop_path else None,
            projection_kernel=self.projection_kernel if stage > 2 else 1,
            zero_init_last=self.zero_init_last,
            conv_bias=self._conv_bias,
            activated=number == 1 and stage == 2 and self.first_act == "stem",
        )

    def _shortcut(self, *, subsamples: bool) -> ModuleDef | None:
        # Option C is the 1x1 convolution on every shortcut, with the norm that projections have.
        choice = "C" if self.skip == "conv1x1" else self.shortcut
        if subsamples and choice in ("A", "B"):
            return Subsample
        return constructors.chosen(choice, SHORTCUTS)

    def _skip(self, parts: Parts) -> ModuleDef | None:
        skip = constructors.chosen(self.skip, SKIPS)
        if skip is None:
            return None
        return parts.bind(
            skip,
            skip_scale=self.skip_scale,
            residual_scale=self.residual_scale,
            gate_bias=self.gate_bias,
        )

    def _gate(self, stage: int, parts: Parts) -> ModuleDef | None:
        choice = self.gate or ("se" if self.se_reduction else None)
        if choice is None or (self.se_stages is not None and stage not in self.se_stages):
            return None
        own: dict[str, Any] = {}
        if choice == "se":
            own = {
                "reduction": self.se_reduction,
                "squeeze": self.se_squeeze,
                "gate": self.se_gate,
                "bias": self.se_bias,
                "divisor": self.se_divisor,
            }
        return parts.bind(constructors.chosen(choice, gates.GATES), **own)

    def _check_images(self, images: jax.Array) -> None:
        if images.ndim != 4:
            raise UserError(f"images must be [N, H, W, C]; their shape is {images.shape}.")
        if isinstance(self.stem, str):
            checks.image_size(self.stem, images.shape[1:3], any_size=self.any_size)


def _name(stage: int, number: int) -> str:
    return f"stage{stage}_block{number}"


def resnet(depth: int = 50, **arguments: Any) -> ResNet:
    """A ResNet of four stages, with the stage sizes and the block of its depth (He 2015, Table 1).

    Args:
      depth: a key of axes.IMAGENET_DEPTHS.
      **arguments: of `ResNet`.

    Raises:
      UserError: if there is no such depth, or the arguments do not fit together.
    """
    if depth not in axes.IMAGENET_DEPTHS:
        raise UserError(f"depth {depth} is not one of {checks.listed(axes.IMAGENET_DEPTHS)}.")
    block, stage_sizes = axes.IMAGENET_DEPTHS[depth]
    return axes.check(ResNet(stage_sizes, block=block, **arguments))


def cifar_resnet(depth: int = 20, block: str = "basic", **arguments: Any) -> ResNet:
    """A ResNet of three equal stages for 32x32 images (He 2015, Section 4.2).

    Args:
      depth: 6n + 2 with basic blocks, 9n + 2 with bottlenecks (1603.05027), n blocks a stage.
      block: 'basic' or 'bottleneck'.
      **arguments: of `ResNet`.

    Raises:
      UserError: if the depth is not of that form, or the arguments do not fit together.
    """
    checks.choice("block", block, axes.CHOICES["block"])
    step = 6 if block == "basic" else 9
    size, rest = divmod(depth - 2, step)
    if rest or size < 1:
        valid = ", ".join(str(step * n + 2) for n in range(1, 10))
        raise UserError(
            f"depth {depth} is not {step}n + 2, as a network of {block} blocks needs: {valid}, ..."
        )
    arguments = {"num_classes": 10, "num_filters": 16, "stem": "cifar", **arguments}
    return axes.check(ResNet((size,) * 3, block=block, **arguments))


def wide_resnet(depth: int = 28, width: int = 10, **arguments: Any) -> ResNet:
    """A Wide ResNet for 32x32 images (Zagoruyko 2016, arXiv 1605.07146, Table 1).

    Args:
      depth: 6n + 4, n basic blocks in each of three stages.
      width: multiplies the filters of the stages, 16, 32 and 64.
      **arguments: of `ResNet`.

    Raises:
      UserError: if the depth is not of that form, or the arguments do not fit together.
    """
    size, rest = divmod(depth - 4, 6)
    if rest or size < 1:
        raise UserError(f"depth {depth} is not 6n + 4: 10, 16, 22, 28, 34, 40, ...")
    form = {"num_classes": 10, "unit": "full_preact", "stem": "cifar", "stem_filters": 16}
    arguments = {**form, "num_filters": 16 * width, **arguments}
    return axes.check(ResNet((size,) * 3, block="basic", **arguments))
