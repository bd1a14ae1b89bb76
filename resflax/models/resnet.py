"""ResNet v1 and v2, plain nets, ResNeXt, SE-ResNet, SE-ResNeXt and SENet-154.

All of them are one network, `ResNet`, with arguments; `resnet` and `cifar_resnet` choose the stage
sizes for a depth, on ImageNet and on CIFAR. Stages are numbered as in the papers' tables: the stem
is stage 1, conv2_x is stage 2.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resflax.models import axes, layers, residual
from resflax.ops import pool


class ResNet(nn.Module):
    """A residual network, from images to logits.

    Variables: 'params' and, for the running means and variances, 'batch_stats'; random numbers:
    'dropout' where `dropout` is not zero and `train` is true.

    Attributes:
      stage_sizes: blocks in each stage. The first block of every stage but the first halves the
        image; filters double from stage to stage.
      num_classes: units of the classifier.
      block: 'basic' or 'bottleneck'.
      num_filters: of the first stage; a bottleneck block gives out four times as many.
      stem_filters: of the stem; None: as many as in the first stage.
      stem: 'imagenet' (7x7/2, then 3x3/2 max-pool), 'cifar' (3x3, no pool) or 'deep' (three 3x3,
        then a 3x3/2 max-pool that rounds up; SENet-154).
      cardinality: groups of the 3x3 convolutions of bottleneck blocks (ResNeXt, 1611.05431).
      base_width: channels of a group where a block has 64 filters; in proportion elsewhere.
      stride_in: the convolution of a bottleneck that has the stride: '1x1' or '3x3'.
      halve_first: half the width out of a bottleneck's first convolution (SENet-154).
      form: which of the equal forms of a ResNeXt block is computed, 'a', 'b' or 'c'; see
        residual.bottleneck.
      shortcut: 'A', 'B', 'C' or 'none'; see residual.ResidualBlock.
      projection_kernel: side of the projections' kernels, from stage 3 on (stage 2: always 1).
      unit: order of norm, activation and addition; a name in residual.UNITS.
      skip: what is done on the identity path (1603.05027, Table 1): 'identity',
        'constant_scaling' (by skip_scale, and F by residual_scale), 'exclusive_gating',
        'shortcut_gating' (gate_bias: the gates' initial bias), 'conv1x1' (option C), 'dropout'.
      skip_scale, residual_scale, gate_bias: of `skip`.
      drop_path: probability that the last block's branch is left out in training; it grows
        linearly from the first block on. See residual.DropPath.
      drop_path_mode: 'batch', the l-th of L blocks at l / L of it (1603.09382, Section 3), or
        'sample', at (l - 1) / (L - 1) of it.
      se_reduction: of the squeeze-excite gates; 0: no gates.
      se_squeeze, se_gate, se_bias: see layers.SqueezeExcite.
      se_stages: the stages that have gates, 2 to 5; None: all.
      se_integration: where the gate stands in the block; see residual.ResidualBlock.
      zero_init_last: every residual branch starts as zero.
      dropout: rate before the classifier.
      act: the activation; a name in layers.ACTIVATIONS.
      norm: 'batch', 'group' or 'none' (the convolutions then have biases).
      kernel_init: of the convolutions' kernels; a name in layers.INITS.
      bn_momentum: share of the old running statistics that a training step keeps.
      bn_epsilon: added to the variance.
      axis_name: the mapped axis over which batch norm averages its statistics; None: none.
      dtype: of the computation. Parameters, statistics and logits are float32.
    """

    stage_sizes: Sequence[int]
    num_classes: int = 1000
    block: str = "bottleneck"
    num_filters: int = 64
    stem_filters: int | None = None
    stem: str = "imagenet"
    cardinality: int = 1
    base_width: int = 64
    stride_in: str = "3x3"
    halve_first: bool = False
    form: str = "c"
    shortcut: str = "B"
    projection_kernel: int = 1
    unit: str = "original"
    skip: str = "identity"
    skip_scale: float = 1.0
    residual_scale: float = 1.0
    gate_bias: float = 0.0
    drop_path: float = 0.0
    drop_path_mode: str = "batch"
    se_reduction: int = 0
    se_squeeze: str = "avg"
    se_gate: str = "sigmoid"
    se_bias: bool = True
    se_stages: Sequence[int] | None = None
    se_integration: str = "standard"
    zero_init_last: bool = False
    dropout: float = 0.0
    act: str = "relu"
    norm: str = "batch"
    kernel_init: str = "he_fan_out"
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Computes logits.

        Args:
          images: float [N, H, W, C], normalised.
          train: whether batch norm uses and updates the batch's statistics, and dropout drops.

        Returns:
          float32 [N, num_classes].

        Raises:
          ValueError: if `images` has not four axes, or is too small for the stem.
        """
        self._check_images(images)
        conv = functools.partial(
            layers.Conv,
            use_bias=self.norm == "none",
            kernel_init=layers.INITS[self.kernel_init],
            dtype=self.dtype,
        )
        norm = layers.norm(
            self.norm,
            train=train,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        act = layers.ACTIVATIONS[self.act]
        unit = residual.UNITS[self.unit]
        # Option C is the 1x1 convolution on every shortcut, with the norm that projections have.
        shortcut = "C" if self.skip == "conv1x1" else self.shortcut
        skip = self._skip(conv, train)
        stem_filters = self.stem_filters or self.num_filters
        x = Stem(self.stem, stem_filters, conv, norm, act, name="stem")(images)
        number = 0
        for stage, size in enumerate(self.stage_sizes, start=2):
            for i in range(1, size + 1):
                number += 1
                x = residual.ResidualBlock(
                    self.branch(stage, stride=2 if stage > 2 and i == 1 else 1),
                    shortcut,
                    unit,
                    conv,
                    norm,
                    act,
                    self._gate(stage),
                    self.se_integration,
                    skip,
                    self._drop_path(number, train),
                    self.projection_kernel if stage > 2 else 1,
                    self.zero_init_last,
                    first=stage == 2 and i == 1,
                    name=f"stage{stage}_block{i}",
                )(x)
        for layer in unit.before:
            x = norm(name="norm")(x) if layer == "norm" else act(x)
        x = pool.global_avg_pool(x)
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        return nn.Dense(self.num_classes, kernel_init=layers.torch_uniform, name="head")(x)

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

    def _skip(self, conv: layers.ModuleDef, train: bool) -> layers.ModuleDef | None:
        if self.skip == "constant_scaling":
            return functools.partial(residual.Scaling, self.skip_scale, self.residual_scale)
        if self.skip in ("exclusive_gating", "shortcut_gating"):
            exclusive = self.skip == "exclusive_gating"
            return functools.partial(residual.Gating, self.gate_bias, exclusive, conv)
        if self.skip == "dropout":
            return functools.partial(residual.ShortcutDropout, train)
        return None

    def _drop_path(self, number: int, train: bool) -> layers.ModuleDef | None:
        if not self.drop_path:
            return None
        blocks = sum(self.stage_sizes)
        share = number / blocks if self.drop_path_mode == "batch" else (number - 1) / (blocks - 1)
        return functools.partial(
            residual.DropPath, self.drop_path * share, self.drop_path_mode, train
        )

    def _gate(self, stage: int) -> layers.ModuleDef | None:
        if not self.se_reduction or (self.se_stages is not None and stage not in self.se_stages):
            return None
        return functools.partial(
            layers.SqueezeExcite,
            self.se_reduction,
            self.se_squeeze,
            self.se_gate,
            self.se_bias,
            dtype=self.dtype,
        )

    def _check_images(self, images: jax.Array) -> None:
        smallest = 1 if self.stem == "cifar" else 32
        if images.ndim != 4 or min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"images must be [N, H, W, C] with H and W at least {smallest} for the stem "
                f"{self.stem!r}; their shape is {images.shape}. The stem 'cifar' takes any size."
            )


class Stem(nn.Module):
    """From images to the first stage: see ResNet.stem."""

    kind: str
    filters: int
    conv: layers.ModuleDef
    norm: layers.ModuleDef
    act: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H / 4, W / 4, filters], rounded up; 'cifar': [N, H, W, filters]."""
        if self.kind == "cifar":
            return self._conv("", x, self.filters, 3)
        if self.kind == "imagenet":
            x = self._conv("", x, self.filters, 7, stride=2)
            return pool.max_pool(x, 3, 2, (1, 1))
        x = self._conv("1", x, self.filters, 3, stride=2)
        x = self._conv("2", x, self.filters, 3)
        x = self._conv("3", x, 2 * self.filters, 3)
        return pool.max_pool(x, 3, 2, (0, 1))

    def _conv(
        self, suffix: str, x: jax.Array, filters: int, kernel_size: int, stride: int = 1
    ) -> jax.Array:
        x = self.conv(filters, kernel_size, stride, name=f"conv{suffix}")(x)
        return self.act(self.norm(name=f"norm{suffix}")(x))


def resnet(depth: int = 50, **arguments: Any) -> ResNet:
    """A ResNet of four stages, with the stage sizes and the block of its depth (He 2015, Table 1).

    Args:
      depth: a key of axes.IMAGENET_DEPTHS.
      **arguments: of `ResNet`.

    Raises:
      ValueError: if there is no such depth, or the arguments do not fit together.
    """
    if depth not in axes.IMAGENET_DEPTHS:
        raise ValueError(f"depth {depth} is not one of {axes.listed(axes.IMAGENET_DEPTHS)}.")
    block, stage_sizes = axes.IMAGENET_DEPTHS[depth]
    return axes.check(ResNet(stage_sizes, block=block, **arguments))


def cifar_resnet(depth: int = 20, block: str = "basic", **arguments: Any) -> ResNet:
    """A ResNet of three equal stages for 32x32 images (He 2015, Section 4.2).

    Args:
      depth: 6n + 2 with basic blocks, 9n + 2 with bottlenecks (1603.05027), n blocks a stage.
      block: 'basic' or 'bottleneck'.
      **arguments: of `ResNet`.

    Raises:
      ValueError: if the depth is not of that form, or the arguments do not fit together.
    """
    axes.check_choice("block", block)
    step = 6 if block == "basic" else 9
    size, rest = divmod(depth - 2, step)
    if rest or size < 1:
        valid = ", ".join(str(step * n + 2) for n in range(1, 10))
        raise ValueError(
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
      ValueError: if the depth is not of that form, or the arguments do not fit together.
    """
    size, rest = divmod(depth - 4, 6)
    if rest or size < 1:
        raise ValueError(f"depth {depth} is not 6n + 4: 10, 16, 22, 28, 34, 40, ...")
    form = {"num_classes": 10, "unit": "full_preact", "stem": "cifar", "stem_filters": 16}
    arguments = {**form, "num_filters": 16 * width, **arguments}
    return axes.check(ResNet((size,) * 3, block="basic", **arguments))
