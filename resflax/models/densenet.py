"""DenseNet: every layer reads the feature maps of all the layers before it (arXiv 1608.06993).

`densenet` chooses the layers of each block for a depth on ImageNet, `cifar_densenet` on CIFAR; with
a bottleneck and compression they are the paper's DenseNet-BC.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resflax.errors import UserError
from resflax.models import checks, constructors, layers
from resflax.models.constructors import Choice, ModuleDef
from resflax.ops import norm as norm_ops
from resflax.ops import pool

STEMS = ("imagenet", "cifar")

# Layers in each dense block, by depth (Table 1; the 2017 version of the paper has 264, the first
# one 161). A layer is two convolutions, so depth = 2 * sum + 5; the name 264 is one less.
IMAGENET_DEPTHS: dict[int, tuple[int, ...]] = {
    121: (6, 12, 24, 16),
    161: (6, 12, 36, 24),
    169: (6, 12, 32, 32),
    201: (6, 12, 48, 32),
    264: (6, 12, 64, 48),
}


class DenseNet(nn.Module):
    """A densely connected network, from images to logits.

    Variables: 'params' and, for the running means and variances, 'batch_stats'; random numbers:
    'dropout' where `dropout` is not zero and `train` is true.

    Attributes:
      stage_sizes: layers in each dense block. A transition between two blocks halves the image.
      growth_rate: channels that a layer adds: k of the paper.
      stem_filters: channels out of the stem.
      num_classes: units of the classifier.
      stem: 'imagenet' (7x7/2, norm, ReLU, 3x3/2 max-pool) or 'cifar' (a bare 3x3 convolution).
      any_size: whether images are taken that the stem was not made for: smaller than 64 pixels
        for 'imagenet', larger than 128 for 'cifar'.
      bottleneck: a 1x1 convolution to 4 * growth_rate channels before each 3x3 (Section 3).
      compression: share of the channels that a transition keeps, rounded down: theta of Section 3.
      dropout: rate after every convolution but the first. 0.2 in Table 2, without augmentation.
      norm: 'batch', 'group' or 'none' (the convolutions then have biases), or a constructor; see
        layers.norm.
      kernel_init: of the convolutions' kernels, as in torchvision; a name in layers.INITS, or
        a flax initialiser.
      bn_momentum: share of the old running statistics that a training step keeps.
      bn_epsilon: added to the variance.
      axis_name: the mapped axis over which batch norm averages its statistics; None: none.
      dtype: of the computation. Parameters, statistics and logits are float32.
    """

    stage_sizes: Sequence[int]
    growth_rate: int = 32
    stem_filters: int = 64
    num_classes: int = 1000
    stem: str = "imagenet"
    any_size: bool = False
    bottleneck: bool = True
    compression: float = 0.5
    dropout: float = 0.0
    norm: Choice = "batch"
    kernel_init: Choice = "he_fan_in"
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    axis_name: str | None = None
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
          'block1' to 'block4' [N, H', W', C'], 'pooled' [N, C], 'logits'.

        Raises:
          UserError: if `images` has not four axes, or is too small to be halved that often.
        """
        self._check_images(images)
        conv = functools.partial(
            layers.Conv,
            use_bias=self.norm == "none",
            kernel_init=layers.initialiser(self.kernel_init),
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
        dropout = functools.partial(nn.Dropout, self.dropout, deterministic=not train)
        x = Stem(self.stem, self.stem_filters, conv, norm, name="stem")(images)
        outputs = {"stem": x}
        for block, size in enumerate(self.stage_sizes, start=1):
            if block > 1:
                # Truncated: theta = 1 keeps every channel, and 0.5 of an odd number rounds down.
                kept = int(self.compression * x.shape[-1])
                x = Transition(kept, conv, norm, dropout, name=f"transition{block - 1}")(x)
            for i in range(1, size + 1):
                layer = DenseLayer(
                    self.growth_rate,
                    self.bottleneck,
                    conv,
                    norm,
                    dropout,
                    name=f"block{block}_layer{i}",
                )
                x = jnp.concatenate([x, layer(x)], axis=-1)
            outputs[f"block{block}"] = x
        x = norm_ops.relu(constructors.apply("norm", norm(name="norm"), x))
        x = outputs["pooled"] = pool.global_avg_pool(x)
        head = functools.partial(nn.Dense, kernel_init=layers.torch_uniform, dtype=jnp.float32)
        outputs["logits"] = head(self.num_classes, name="head")(x)
        return outputs if features else outputs["logits"]

    def _check_images(self, images: jax.Array) -> None:
        halvings = len(self.stage_sizes) - 1 + (2 if self.stem == "imagenet" else 0)
        if images.ndim != 4 or min(images.shape[1:3]) < 2**halvings:
            raise UserError(
                f"images must be [N, H, W, C] with H and W at least {2**halvings}, for the stem "
                f"{self.stem!r} and {len(self.stage_sizes)} blocks; their shape is {images.shape}."
            )
        checks.image_size(self.stem, images.shape[1:3], any_size=self.any_size)


class Stem(nn.Module):
    """From images to the first block: see DenseNet.stem."""

    kind: str
    filters: int
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H / 4, W / 4, filters], rounded up; 'cifar': [N, H, W, filters]."""
        if self.kind == "cifar":
            # The first layer and the first transition begin with norms of their own.
            return self.conv(self.filters, 3, name="conv")(x)
        x = self.conv(self.filters, 7, 2, name="conv")(x)
        x = norm_ops.relu(constructors.apply("norm", self.norm(name="norm"), x))
        return pool.max_pool(x, 3, 2, (1, 1))


class DenseLayer(nn.Module):
    """H of the paper (Section 3): norm, ReLU, 3x3 convolution; before that, the bottleneck's.

    Attributes:
      growth_rate: channels of the result.
      bottleneck: whether norm, ReLU and a 1x1 convolution to 4 * growth_rate channels go before.
      conv, norm, dropout: constructors of the layers, with dtype, mode and axis bound.
    """

    growth_rate: int
    bottleneck: bool
    conv: ModuleDef
    norm: ModuleDef
    dropout: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H, W, growth_rate]: the new channels alone."""
        convs = [(self.growth_rate, 3)]
        if self.bottleneck:
            convs.insert(0, (4 * self.growth_rate, 1))
        for i, (filters, kernel_size) in enumerate(convs, start=1):
            x = norm_ops.relu(constructors.apply("norm", self.norm(name=f"norm{i}"), x))
            x = self.conv(filters, kernel_size, name=f"conv{i}")(x)
            x = self.dropout(name=f"dropout{i}")(x)
        return x


class Transition(nn.Module):
    """Between two blocks: norm, ReLU, 1x1 convolution, 2x2 average pool (Section 3)."""

    filters: int
    conv: ModuleDef
    norm: ModuleDef
    dropout: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H / 2, W / 2, filters], rounded down."""
        x = norm_ops.relu(constructors.apply("norm", self.norm(name="norm"), x))
        x = self.dropout(name="dropout")(self.conv(self.filters, name="conv")(x))
        return pool.avg_pool(x, 2, 2)


def densenet(depth: int = 121, growth_rate: int = 32, **arguments: Any) -> DenseNet:
    """A DenseNet-BC of four blocks, with the block sizes of its depth (Table 1).

    Args:
      depth: a key of IMAGENET_DEPTHS.
      growth_rate: channels that a layer adds; the stem has twice as many.
      **arguments: of `DenseNet`.

    Raises:
      UserError: if there is no such depth, or an argument makes no network.
    """
    if depth not in IMAGENET_DEPTHS:
        raise UserError(f"depth {depth} is not one of {', '.join(map(str, IMAGENET_DEPTHS))}.")
    arguments = {"stem_filters": 2 * growth_rate, **arguments}
    return _checked(DenseNet(IMAGENET_DEPTHS[depth], growth_rate, **arguments))


def cifar_densenet(
    depth: int = 40, growth_rate: int = 12, bottleneck: bool = False, **arguments: Any
) -> DenseNet:
    """A DenseNet of three equal blocks for 32x32 images (Section 3 and Table 2).

    Args:
      depth: 3n + 4, with bottlenecks 6n + 4, n layers a block.
      growth_rate: channels that a layer adds.
      bottleneck: DenseNet-BC: layers with bottlenecks, a stem of 2 * growth_rate channels where it
        has 16 otherwise, and a compression of 0.5 where it is 1 otherwise.
      **arguments: of `DenseNet`.

    Raises:
      UserError: if the depth is not of that form, or an argument makes no network.
    """
    step = 6 if bottleneck else 3
    size, rest = divmod(depth - 4, step)
    if rest or size < 1:
        valid = ", ".join(str(step * n + 4) for n in (*range(1, 9), 12, 16))
        raise UserError(
            f"depth {depth} is not {step}n + 4, as bottleneck={bottleneck} needs: {valid}, ..."
        )
    # The released code has a stem of 2 * growth_rate everywhere; the published sizes have not.
    variant = {
        "stem_filters": 2 * growth_rate if bottleneck else 16,
        "compression": 0.5 if bottleneck else 1.0,
    }
    arguments = {"num_classes": 10, "stem": "cifar", **variant, **arguments}
    return _checked(DenseNet((size,) * 3, growth_rate, bottleneck=bottleneck, **arguments))


def _checked(model: DenseNet) -> DenseNet:
    """Returns `model`, or raises UserError where an argument makes no network."""
    checks.choices(model, {"stem": STEMS})
    constructors.check("norm", model.norm, layers.NORMS)
    constructors.check("kernel_init", model.kernel_init, layers.INITS)
    checks.positive(model, "growth_rate", "stem_filters", "num_classes")
    checks.rates(model, "dropout")
    if not 0.0 < model.compression <= 1.0:
        raise UserError(f"compression {model.compression} must be more than 0 and at most 1.")
    if model.compression * (model.stem_filters + model.stage_sizes[0] * model.growth_rate) < 1:
        raise UserError(f"compression {model.compression} leaves a transition without channels.")
    return model
