"""GoogLeNet, as in its paper and with batch norm (Szegedy 2014, arXiv 1409.4842)."""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from resflax.errors import UserError
from resflax.models.inception import (
    CEIL_MAX_POOL,
    SAME_MAX_POOL,
    Conv,
    InceptionNet,
    Layers,
    Part,
    chain,
    checked,
    mixed,
    run,
)
from resflax.models.layers import torch_uniform
from resflax.ops import activation, pool
from resflax.ops.lrn import local_response_norm

# The paper gives no constants; these are those of Caffe's GoogLeNet.
_LRN = functools.partial(local_response_norm, size=5, k=1.0, alpha=1e-4, beta=0.75, divide=True)

# Filters of the 1x1 branch; of the 3x3 branch's reduction, and its own; of the 5x5 branch's; of the
# projection after the pool (Table 1).
MODULES = {
    "inception_3a": (64, 96, 128, 16, 32, 32),
    "inception_3b": (128, 128, 192, 32, 96, 64),
    "inception_4a": (192, 96, 208, 16, 48, 64),
    "inception_4b": (160, 112, 224, 24, 64, 64),
    "inception_4c": (128, 128, 256, 24, 64, 64),
    "inception_4d": (112, 144, 288, 32, 64, 64),
    "inception_4e": (256, 160, 320, 32, 128, 128),
    "inception_5a": (256, 160, 320, 32, 128, 128),
    "inception_5b": (384, 192, 384, 48, 128, 128),
}


class GoogLeNet(InceptionNet):
    """GoogLeNet: nine modules of 1x1, 3x3, 5x5 and pool branches (1409.4842, Table 1, Figure 3).

    Its variables have no 'batch_stats' without batch norm.

    Attributes:
      batch_norm: batch norm after every convolution, as in TensorFlow-slim and torchvision; else,
        as in the paper, biases, and local response norms after the first pool and the third
        convolution.
      kernel_5x5: side of the kernels in the 5x5 branches; slim and torchvision have 3.
      pool4_window: side of the windows of the pool after inception_4e; slim and torchvision have 2.
      aux_heads: classifiers on inception_4a and 4d (Section 5), for training; see `__call__`.
      aux_size: side of the maps that they begin with, averaged from those of any image: 4 in
        torchvision. None: averages over 5x5 positions with a step of 3, as in the paper; the
        classifiers' size then depends on that of the images, and is the paper's at 224 pixels.
      aux_dropout: rate in these classifiers.

    The other attributes are those of InceptionNet.
    """

    batch_norm: bool = False
    kernel_5x5: int = 5
    pool4_window: int = 3
    aux_heads: bool = False
    aux_size: int | None = None
    aux_dropout: float = 0.7
    dropout: float = 0.4

    # Every layer is padded, so less would run; but nothing but padding would be seen.
    smallest_image: ClassVar[int] = 32

    def parts(self) -> dict[str, Part]:
        """The stem and nine modules, with pools before inception_4a and 5a."""
        lrn = () if self.batch_norm else (_LRN,)
        stem = (Conv(64, 7, 2), CEIL_MAX_POOL, *lrn, Conv(64), Conv(192, 3), *lrn, CEIL_MAX_POOL)
        pool4 = functools.partial(pool.max_pool, window=self.pool4_window, stride=2, padding=(0, 1))
        table = {"stem": chain(*stem)}
        for name, (n1, n3_reduce, n3, n5_reduce, n5, projection) in MODULES.items():
            table[name] = mixed(
                (Conv(n1),),
                (Conv(n3_reduce), Conv(n3, 3)),
                (Conv(n5_reduce), Conv(n5, self.kernel_5x5)),
                (SAME_MAX_POOL, Conv(projection)),
            )
            if name == "inception_3b":
                table["pool3"] = chain(CEIL_MAX_POOL)
            if name == "inception_4e":
                table["pool4"] = chain(pool4)
        return table

    def aux_parts(self, train: bool) -> dict[str, Part]:
        """The two classifiers of Section 5."""
        head = functools.partial(
            GoogLeNetAux,
            self.num_classes,
            self.aux_dropout,
            size=self.aux_size,
            deterministic=not train,
        )
        return {"inception_4a": head, "inception_4d": head} if self.aux_heads else {}

    def layers(self, train: bool) -> Layers:
        """Without batch norm: convolutions with biases, and another initialisation."""
        layers = super().layers(train)
        if self.batch_norm:
            return layers
        # Nothing rescales the activations here, and the reductions give out a tenth of what they
        # take in: with the variance of fan-out they would grow with every module.
        he_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        conv = functools.partial(layers.conv, use_bias=True, kernel_init=he_fan_in)
        return dataclasses.replace(layers, conv=conv, norm=None)


class GoogLeNetAux(nn.Module):
    """An auxiliary classifier: average pool, 1x1 convolution, two dense layers."""

    num_classes: int
    dropout: float
    layers: Layers
    size: int | None
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> logits, float32 [N, num_classes].

        Raises:
          UserError: if the pool's window does not fit.
        """
        if self.size is None and min(x.shape[1:3]) < 5:
            raise UserError(
                "aux_heads pool 5x5 positions, so images must have at least 79 pixels; "
                f"here {x.shape[1]}x{x.shape[2]} positions are left."
            )
        if self.size is None:
            x = pool.avg_pool(x, window=5, stride=3)
        else:
            x = pool.adaptive_avg_pool(x, self.size)
        x = run((Conv(128),), x, self.layers)
        x = x.reshape(len(x), -1).astype(jnp.float32)
        x = activation.relu(nn.Dense(1024, kernel_init=torch_uniform, name="hidden")(x))
        x = nn.Dropout(self.dropout, deterministic=self.deterministic, name="dropout")(x)
        return nn.Dense(self.num_classes, kernel_init=torch_uniform, name="head")(x)


def googlenet(**arguments: Any) -> GoogLeNet:
    """A GoogLeNet: the paper's, unless its arguments say otherwise.

    Args:
      **arguments: of `GoogLeNet`.

    Raises:
      UserError: if the arguments make no network.
    """
    model = checked(GoogLeNet(**arguments), narrowest_gate=256)
    if model.kernel_5x5 < 1 or model.kernel_5x5 % 2 == 0:
        raise UserError(f"kernel_5x5 {model.kernel_5x5} must be odd: 5, or 3 as in torchvision.")
    if model.pool4_window not in (2, 3):
        raise UserError(
            f"pool4_window {model.pool4_window} must be 3 (the paper's) or 2 (torchvision's)."
        )
    if model.aux_size is not None and model.aux_size < 1:
        raise UserError(
            f"aux_size {model.aux_size} must be at least 1: 4, as in torchvision; or None."
        )
    if not (model.batch_norm or model.norm_scale):
        raise UserError("norm_scale False needs batch_norm True: without it there is no norm.")
    return model
