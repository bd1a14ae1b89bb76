"""Inception-ResNet v1 and v2 (Szegedy 2016, arXiv 1602.07261), also with squeeze-excite gates."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from resflax.errors import UserError
from resflax.models import checks, inception_v3, inception_v4
from resflax.models.inception import (
    MAX_POOL,
    VALID,
    Branch,
    Conv,
    InceptionNet,
    Layers,
    Part,
    chain,
    checked,
    checked_stage_sizes,
    concatenate,
    mixed,
)
from resflax.ops import activation

Branches = tuple[Branch, ...]


class ResidualInception(nn.Module):
    """y = relu(x + scale * F(x)), F: branches, concatenated, and a linear 1x1 convolution.

    The last convolution has a bias and no norm: norms stand on top of the traditional layers, not
    on the sums (1602.07261, Section 3.2). A gate, if the network has any, is on F, before the
    scale (SE, 1709.01507, Section 3.3).

    Attributes:
      branches: their specs.
      scale: of F; well below 1, or networks of more than 1000 filters die (Section 3.3).
      layers: the network's.
      act: whether the ReLU stands after the sum.
    """

    branches: Branches
    scale: float
    layers: Layers
    act: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] -> the same shape."""
        y = concatenate(self.branches, x, self.layers)
        y = self.layers.conv(x.shape[-1], use_bias=True, name="up")(y)
        if self.layers.gate is not None:
            y = self.layers.gate(name="se")(y)
        y = x + self.scale * y
        return activation.relu(y) if self.act else y


@dataclasses.dataclass(frozen=True)
class Variant:
    """The table of one Inception-ResNet.

    Attributes:
      stem: its first parts.
      block_a, block_b, block_c: branches of the blocks on the three grids.
      reduction_a, reduction_b: the modules between them.
      stage_sizes: the numbers of the blocks.
      channels: of the blocks' inputs on the three grids.
      last_linear: whether the last block has neither scale nor ReLU.
      last: parts after the blocks.
    """

    stem: dict[str, Part]
    block_a: Branches
    reduction_a: Part
    block_b: Branches
    reduction_b: Part
    block_c: Branches
    stage_sizes: tuple[int, int, int]
    channels: tuple[int, int, int]
    last_linear: bool = False
    last: dict[str, Part] = dataclasses.field(default_factory=dict)


def _block_a(filters: int, wide: int) -> Branches:
    """Figures 10 and 16."""
    return (
        (Conv(32),),
        (Conv(32), Conv(32, 3)),
        (Conv(32), Conv(filters, 3), Conv(wide, 3)),
    )


def _factored(first: int, kernel: int, filters: tuple[int, int, int]) -> Branches:
    """A 1x1 branch, and one with a convolution in two (Figures 11, 13, 17 and 19)."""
    reduce, row, column = filters
    return (
        (Conv(first),),
        (Conv(reduce), Conv(row, (1, kernel)), Conv(column, (kernel, 1))),
    )


def _reduction_b(second: int, third: int) -> Part:
    """From 17x17 to 8x8 (Figures 12 and 18)."""
    return mixed(
        (Conv(256), Conv(384, 3, 2, VALID)),
        (Conv(256), Conv(second, 3, 2, VALID)),
        (Conv(256), Conv(second, 3), Conv(third, 3, 2, VALID)),
        (MAX_POOL,),
        gated=False,
    )


# The blocks and the second reduction of v2 are the same in the paper and in the released code.
_V2: dict[str, Any] = {
    "block_a": _block_a(48, 64),
    "reduction_a": inception_v4.reduction_a((256, 256, 384), 384),
    "block_b": _factored(192, 7, (128, 160, 192)),
    "reduction_b": _reduction_b(288, 320),
    "block_c": _factored(192, 3, (192, 224, 256)),
}

VARIANTS: dict[str, Variant] = {
    # Figures 10 to 15.
    "v1": Variant(
        stem={"stem": chain(*inception_v3.STEM, Conv(256, 3, 2, VALID))},
        block_a=_block_a(32, 32),
        reduction_a=inception_v4.reduction_a((192, 192, 256), 384),
        block_b=_factored(128, 7, (128, 128, 128)),
        reduction_b=_reduction_b(256, 256),
        block_c=_factored(192, 3, (192, 192, 192)),
        stage_sizes=(5, 10, 5),
        channels=(256, 896, 1792),
    ),
    # The released network is deeper than the paper's, and has another stem.
    "v2": Variant(
        stem={
            "stem": chain(*inception_v3.STEM, MAX_POOL),
            "mixed_5b": mixed(
                (Conv(96),),
                (Conv(48), Conv(64, 5)),
                (Conv(64), Conv(96, 3), Conv(96, 3)),
                (inception_v4.AVG_POOL, Conv(64)),
                gated=False,
            ),
        },
        **_V2,
        stage_sizes=(10, 20, 10),
        channels=(320, 1088, 2080),
        last_linear=True,
        last={"conv_7b": chain(Conv(1536))},
    ),
    # Figures 15 to 19. Their 1154 and 2048 linear filters are misprints: the reductions give out
    # 3 * 384 = 1152 and 1152 + 384 + 288 + 320 = 2144 channels.
    "v2_paper": Variant(
        stem=inception_v4.STEM,
        **_V2,
        stage_sizes=(5, 10, 5),
        channels=(384, 1152, 2144),
    ),
}


class InceptionResNet(InceptionNet):
    """An Inception-ResNet: residual blocks on three grids, with reductions between them.

    Squeeze-excite gates stand on the residual branches.

    Attributes:
      variant: 'v1' (1602.07261, Figures 10 to 15), 'v2' (the released code of v2) or 'v2_paper'
        (Figures 15 to 19).
      stage_sizes: the numbers of the blocks A, B and C.
      scales: of the residual branches of the blocks A, B and C. The last block of 'v2' has none.

    The other attributes are those of InceptionNet.
    """

    variant: str = "v2"
    stage_sizes: Sequence[int] = (10, 20, 10)
    scales: Sequence[float] = (0.17, 0.1, 0.2)
    dropout: float = 0.2

    def parts(self) -> dict[str, Part]:
        """The stem, three stages of equal blocks with reductions between them, and what follows."""
        variant = VARIANTS[self.variant]
        a, b, c = self.stage_sizes
        scale_a, scale_b, scale_c = self.scales
        block_a = _residual(variant.block_a, scale_a)
        block_b = _residual(variant.block_b, scale_b)
        block_c = _residual(variant.block_c, scale_c)
        blocks_c = {f"block_c{i}": block_c for i in range(1, c + 1)}
        if variant.last_linear:
            blocks_c[f"block_c{c}"] = _residual(variant.block_c, 1.0, act=False)
        return {
            **variant.stem,
            **{f"block_a{i}": block_a for i in range(1, a + 1)},
            "reduction_a": variant.reduction_a,
            **{f"block_b{i}": block_b for i in range(1, b + 1)},
            "reduction_b": variant.reduction_b,
            **blocks_c,
            **variant.last,
        }


def _residual(branches: Branches, scale: float, act: bool = True) -> Part:
    return functools.partial(ResidualInception, branches, scale, act=act)


def inception_resnet(
    variant: str = "v2", stage_sizes: Sequence[int] | None = None, **arguments: Any
) -> InceptionResNet:
    """An Inception-ResNet.

    Args:
      variant: 'v1', 'v2' or 'v2_paper'; see `InceptionResNet`.
      stage_sizes: the numbers of the blocks on the three grids; None: as published.
      **arguments: of `InceptionResNet`.

    Raises:
      UserError: if there is no such variant, or the arguments make no network.
    """
    checks.choice("variant", variant, VARIANTS)
    published = VARIANTS[variant]
    sizes = checked_stage_sizes(stage_sizes or published.stage_sizes, published.stage_sizes)
    model = InceptionResNet(variant=variant, stage_sizes=sizes, **arguments)
    if len(model.scales) != 3:
        raise UserError(f"scales {model.scales} must be three numbers, such as (0.17, 0.1, 0.2).")
    return checked(model, narrowest_gate=published.channels[0])
