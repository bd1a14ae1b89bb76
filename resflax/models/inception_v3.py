"""Inception v3 (Szegedy 2015, Rethinking the Inception Architecture, arXiv 1512.00567)."""

import functools
from typing import Any

import flax.linen as nn
import jax

from resflax.errors import UserError
from resflax.models.inception import (
    MAX_POOL,
    VALID,
    Branch,
    Conv,
    Fork,
    InceptionNet,
    Layers,
    Part,
    Spec,
    chain,
    checked,
    mixed,
    run,
)
from resflax.models.layers import torch_uniform
from resflax.ops import pool

# Also of Inception-ResNet: [N, 299, 299, 3] -> [N, 71, 71, 192].
STEM: Branch = (
    Conv(32, 3, 2, VALID),
    Conv(32, 3, 1, VALID),
    Conv(64, 3),
    MAX_POOL,
    Conv(80),
    Conv(192, 3, 1, VALID),
)

# A 3x3 convolution in two, of rows and of columns, beside each other (Figure 7).
_FORK = Fork((Conv(384, (1, 3)), Conv(384, (3, 1))))


class InceptionV3(InceptionNet):
    """Inception v3: eleven modules, with 7x7 convolutions in two (1512.00567, Section 6).

    Squeeze-excite gates stand after every module.

    Attributes:
      aux_heads: a classifier on mixed_6e (Section 4), for training; see `__call__`. Images have 299
        pixels at least then.
      count_padding: whether average pools count the zeros around the image, as torchvision's and
        timm's do; TensorFlow's and Keras' do not.

    The other attributes are those of InceptionNet.
    """

    aux_heads: bool = False
    count_padding: bool = True
    dropout: float = 0.2

    def parts(self) -> dict[str, Part]:
        """The stem and eleven modules, 6a and 7a of which halve the image."""
        average = functools.partial(
            pool.avg_pool, window=3, stride=1, padding=1, count_padding=self.count_padding
        )
        return {
            "stem": chain(*STEM, MAX_POOL),
            "mixed_5b": _module_a(32, average),
            "mixed_5c": _module_a(64, average),
            "mixed_5d": _module_a(64, average),
            "mixed_6a": mixed(
                (Conv(384, 3, 2, VALID),),
                (Conv(64), Conv(96, 3), Conv(96, 3, 2, VALID)),
                (MAX_POOL,),
            ),
            "mixed_6b": _module_b(128, average),
            "mixed_6c": _module_b(160, average),
            "mixed_6d": _module_b(160, average),
            "mixed_6e": _module_b(192, average),
            "mixed_7a": mixed(
                (Conv(192), Conv(320, 3, 2, VALID)),
                (Conv(192), Conv(192, (1, 7)), Conv(192, (7, 1)), Conv(192, 3, 2, VALID)),
                (MAX_POOL,),
            ),
            "mixed_7b": _module_c(average),
            "mixed_7c": _module_c(average),
        }

    def aux_parts(self, train: bool) -> dict[str, Part]:
        """The classifier of Section 4."""
        head = functools.partial(InceptionV3Aux, self.num_classes)
        return {"mixed_6e": head} if self.aux_heads else {}


def _module_a(projection: int, average: Spec) -> Part:
    """Two 3x3 convolutions beside a 5x5, which is a 3x3 in the paper's Figure 5."""
    return mixed(
        (Conv(64),),
        (Conv(48), Conv(64, 5)),
        (Conv(64), Conv(96, 3), Conv(96, 3)),
        (average, Conv(projection)),
    )


def _module_b(filters: int, average: Spec) -> Part:
    """Every 7x7 convolution in two, of rows and of columns (Figure 6)."""
    return mixed(
        (Conv(192),),
        (Conv(filters), Conv(filters, (1, 7)), Conv(192, (7, 1))),
        (
            Conv(filters),
            Conv(filters, (7, 1)),
            Conv(filters, (1, 7)),
            Conv(filters, (7, 1)),
            Conv(192, (1, 7)),
        ),
        (average, Conv(192)),
    )


def _module_c(average: Spec) -> Part:
    """Wider instead of deeper, on the coarsest grid (Figure 7)."""
    return mixed(
        (Conv(320),),
        (Conv(384), _FORK),
        (Conv(448), Conv(384, 3), _FORK),
        (average, Conv(192)),
    )


class InceptionV3Aux(nn.Module):
    """The auxiliary classifier, with batch norm: 5x5/3 average pool, 1x1, 5x5, dense layer."""

    num_classes: int
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> logits, float32 [N, num_classes].

        Raises:
          UserError: if the windows do not fit.
        """
        if min(x.shape[1:3]) < 17:
            raise UserError(
                "aux_heads have a 5x5 convolution over pools with a step of 3, so images must have "
                f"at least 299 pixels; here {x.shape[1]}x{x.shape[2]} positions are left, not 17."
            )
        average = functools.partial(pool.avg_pool, window=5, stride=3)
        x = run((average, Conv(128), Conv(768, 5, 1, VALID)), x, self.layers)
        x = pool.global_avg_pool(x)
        return nn.Dense(self.num_classes, kernel_init=torch_uniform, name="head")(x)


def inception_v3(**arguments: Any) -> InceptionV3:
    """An Inception v3.

    Args:
      **arguments: of `InceptionV3`.

    Raises:
      UserError: if the arguments make no network.
    """
    return checked(InceptionV3(**arguments), narrowest_gate=256)
