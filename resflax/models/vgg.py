"""VGG: stages of 3x3 convolutions, then three dense layers (arXiv 1409.1556); SE-VGG.

`vgg` chooses the convolutions of each stage for a depth.
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
from resflax.models.gates import SqueezeExcite
from resflax.ops import activation, pool
from resflax.ops import norm as norm_ops

# Convolutions in each stage, by depth (Table 1: configurations A, B, D and E).
DEPTHS: dict[int, tuple[int, ...]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}

# The side of the maps that fc6 was published on: of images of 224 pixels, after five halvings.
MAP_SIZE = 7


class VGG(nn.Module):
    """A VGG network, from images to logits.

    Variables: 'params' and, with batch norm, 'batch_stats'; random numbers: 'dropout' where
    `dropout` is not zero and `train` is true.

    Attributes:
      stage_sizes: convolutions in each stage. A 2x2 max-pool ends every stage.
      num_classes: units of the classifier.
      num_filters: of the first stage; they double from stage to stage, up to eight times as many.
      fc_units: of the two hidden dense layers.
      se_reduction: of the squeeze-excite gates after every ReLU of a convolution (SE, 1709.01507,
        Section 5.1); 0: no gates.
      se_bias: whether the gates' dense layers have biases.
      dense_evaluation: whether the dense layers are computed at every 7x7 positions of larger maps,
        as convolutions, and averaged over them (Section 3.2; timm), instead of once on maps that
        are averaged to 7x7 (torchvision). The parameters are the same; smaller maps are averaged
        up to 7 positions in either case.
      dropout: rate after each hidden dense layer.
      norm: 'none' as in the paper, 'batch', 'group' or a constructor (see layers.norm), between
        convolution and ReLU; the convolutions have biases all the same, as in torchvision.
      kernel_init: of the convolutions' kernels; a name in layers.INITS, or a flax initialiser.
        The paper starts the deep nets from trained shallow ones, torchvision from this.
      bn_momentum: share of the old running statistics that a training step keeps.
      bn_epsilon: added to the variance.
      axis_name: the mapped axis over which batch norm averages its statistics; None: none.
      dtype: of the computation. Parameters, statistics and logits are float32.
    """

    stage_sizes: Sequence[int]
    num_classes: int = 1000
    num_filters: int = 64
    fc_units: int = 4096
    se_reduction: int = 0
    se_bias: bool = True
    dense_evaluation: bool = False
    dropout: float = 0.5
    norm: Choice = "none"
    kernel_init: Choice = "he_fan_out"
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
          images: float [N, H, W, C], normalised. Maps of other sizes than those of 224 pixels are
            averaged to that size before fc6; see `dense_evaluation`.
          train: whether batch norm uses and updates the batch's statistics, and dropout drops.
          features: whether to return what comes out of every part of the network.

        Returns:
          float32 [N, num_classes]; with `features`, that and what is before it by name: 'stage1' to
          'stage5' [N, H', W', C'], before their pools, 'fc6' and 'fc7' [..., fc_units], 'logits'.

        Raises:
          UserError: if `images` has not four axes, or is too small for the max-pools.
        """
        self._check_images(images)
        conv = functools.partial(
            layers.Conv,
            kernel_size=3,
            use_bias=True,
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
        dense = functools.partial(nn.Dense, kernel_init=nn.initializers.normal(0.01))
        outputs = {}
        x = images
        for stage, size in enumerate(self.stage_sizes, start=1):
            stage_filters = self.num_filters * min(2 ** (stage - 1), 8)
            name = f"stage{stage}"
            x = Stage(size, stage_filters, conv, norm, self._gate(), name=name)(x)
            outputs[name] = x
            x = pool.max_pool(x, 2, 2, (0, 0))
        x = self._fc6_inputs(x)
        for name in ("fc6", "fc7"):
            x = outputs[name] = activation.relu(
                dense(self.fc_units, dtype=self.dtype, name=name)(x)
            )
            x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout_{name}")(x)
        # The classifier is linear: the mean of its scores is the score of the mean.
        x = pool.global_avg_pool(x) if self.dense_evaluation else x
        outputs["logits"] = dense(self.num_classes, dtype=jnp.float32, name="head")(x)
        return outputs if features else outputs["logits"]

    def _fc6_inputs(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, 49 C]; dense_evaluation: [N, H', W', 49 C], every window's."""
        if not self.dense_evaluation:
            return pool.adaptive_avg_pool(x, MAP_SIZE).reshape(x.shape[0], -1)
        height, width = (max(side, MAP_SIZE) for side in x.shape[1:3])
        x = pool.adaptive_avg_pool(x, (height, width))
        rows, columns = height - MAP_SIZE + 1, width - MAP_SIZE + 1
        windows = [
            x[:, i : i + rows, j : j + columns] for i in range(MAP_SIZE) for j in range(MAP_SIZE)
        ]
        return jnp.concatenate(windows, axis=-1)

    def _gate(self) -> ModuleDef | None:
        if not self.se_reduction:
            return None
        return functools.partial(
            SqueezeExcite, self.se_reduction, bias=self.se_bias, dtype=self.dtype
        )

    def _check_images(self, images: jax.Array) -> None:
        smallest = 2 ** len(self.stage_sizes)
        if images.ndim != 4 or min(images.shape[1:3]) < smallest:
            raise UserError(
                f"images must be [N, H, W, C] with H and W at least {smallest}, for "
                f"{len(self.stage_sizes)} max-pools; their shape is {images.shape}."
            )


class Stage(nn.Module):
    """Convolution, norm, ReLU, gate, a number of times.

    Attributes:
      size: the number of times.
      filters: of every convolution.
      conv, norm: constructors of the layers, with dtype, mode and axis bound.
      gate: constructor of the squeeze-excite layer, or None.
    """

    size: int
    filters: int
    conv: ModuleDef
    norm: ModuleDef
    gate: ModuleDef | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> [N, H, W, filters]."""
        for i in range(1, self.size + 1):
            x = self.conv(self.filters, name=f"conv{i}")(x)
            x = norm_ops.relu(constructors.apply("norm", self.norm(name=f"norm{i}"), x))
            x = x if self.gate is None else self.gate(name=f"se{i}")(x)
        return x


def vgg(depth: int = 16, **arguments: Any) -> VGG:
    """A VGG network of five stages, with the stage sizes of its depth (Table 1).

    Args:
      depth: layers with weights: a key of DEPTHS.
      **arguments: of `VGG`.

    Raises:
      UserError: if there is no such depth, or an argument makes no network.
    """
    if depth not in DEPTHS:
        raise UserError(f"depth {depth} is not one of {', '.join(map(str, DEPTHS))}.")
    return _checked(VGG(DEPTHS[depth], **arguments))


def _checked(model: VGG) -> VGG:
    """Returns `model`, or raises UserError where an argument makes no network."""
    constructors.check("norm", model.norm, layers.NORMS)
    constructors.check("kernel_init", model.kernel_init, layers.INITS)
    checks.positive(model, "num_classes", "num_filters", "fc_units")
    checks.rates(model, "dropout")
    if not 0 <= model.se_reduction <= model.num_filters:
        raise UserError(
            f"se_reduction {model.se_reduction} must be 0 (no gates) or leave a unit of the first "
            f"stage's {model.num_filters} channels: at most {model.num_filters}."
        )
    return model
