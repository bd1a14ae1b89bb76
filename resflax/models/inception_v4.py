"""Inception v4 (Szegedy 2016, arXiv 1602.07261)."""

import functools
from collections.abc import Sequence
from typing import Any

from resflax.models.inception import (
    MAX_POOL,
    VALID,
    Conv,
    Fork,
    InceptionNet,
    Part,
    chain,
    checked,
    checked_stage_sizes,
    mixed,
)
from resflax.ops import pool

# TensorFlow does not count the zeros around the image.
AVG_POOL = functools.partial(pool.avg_pool, window=3, stride=1, padding=1, count_padding=False)

# Figure 3: [N, 299, 299, 3] -> [N, 35, 35, 384]. Its 7x1 and 1x7 are in the order of the released
# code.
STEM: dict[str, Part] = {
    "stem": chain(Conv(32, 3, 2, VALID), Conv(32, 3, 1, VALID), Conv(64, 3)),
    "mixed_3a": mixed((MAX_POOL,), (Conv(96, 3, 2, VALID),), gated=False),
    "mixed_4a": mixed(
        (Conv(64), Conv(96, 3, 1, VALID)),
        (Conv(64), Conv(64, (1, 7)), Conv(64, (7, 1)), Conv(96, 3, 1, VALID)),
        gated=False,
    ),
    "mixed_5a": mixed((Conv(192, 3, 2, VALID),), (MAX_POOL,), gated=False),
}


def reduction_a(klm: tuple[int, int, int], n: int) -> Part:
    """From 35x35 to 17x17, also of the Inception-ResNets (Figure 7; k, l, m and n: Table 1)."""
    return mixed(
        (Conv(n, 3, 2, VALID),),
        (Conv(klm[0]), Conv(klm[1], 3), Conv(klm[2], 3, 2, VALID)),
        (MAX_POOL,),
        gated=False,
    )


# Figures 4, 5 and 6: the modules on the grids of 35x35, 17x17 and 8x8 positions.
MODULE_A = mixed(
    (Conv(96),),
    (Conv(64), Conv(96, 3)),
    (Conv(64), Conv(96, 3), Conv(96, 3)),
    (AVG_POOL, Conv(96)),
)
MODULE_B = mixed(
    (Conv(384),),
    (Conv(192), Conv(224, (1, 7)), Conv(256, (7, 1))),
    (Conv(192), Conv(192, (7, 1)), Conv(224, (1, 7)), Conv(224, (7, 1)), Conv(256, (1, 7))),
    (AVG_POOL, Conv(128)),
)
_FORK = Fork((Conv(256, (1, 3)), Conv(256, (3, 1))))
MODULE_C = mixed(
    (Conv(256),),
    (Conv(384), _FORK),
    (Conv(384), Conv(448, (3, 1)), Conv(512, (1, 3)), _FORK),
    (AVG_POOL, Conv(256)),
)
# Figure 8.
REDUCTION_B = mixed(
    (Conv(192), Conv(192, 3, 2, VALID)),
    (Conv(256), Conv(256, (1, 7)), Conv(320, (7, 1)), Conv(320, 3, 2, VALID)),
    (MAX_POOL,),
    gated=False,
)


class InceptionV4(InceptionNet):
    """Inception v4: 4, 7 and 3 modules on three grids (1602.07261, Figure 9).

    Squeeze-excite gates stand after the modules A, B and C: not in the stem and the reductions.

    Attributes:
      stage_sizes: the numbers of the modules A, B and C.

    The other attributes are those of InceptionNet.
    """

    stage_sizes: Sequence[int] = (4, 7, 3)
    dropout: float = 0.2

    def parts(self) -> dict[str, Part]:
        """The stem, and three stages of equal modules with reductions between them."""
        table = dict(STEM)
        a, b, c = self.stage_sizes
        table |= {f"inception_a{i}": MODULE_A for i in range(1, a + 1)}
        table["reduction_a"] = reduction_a((192, 224, 256), 384)
        table |= {f"inception_b{i}": MODULE_B for i in range(1, b + 1)}
        table["reduction_b"] = REDUCTION_B
        table |= {f"inception_c{i}": MODULE_C for i in range(1, c + 1)}
        return table


def inception_v4(stage_sizes: Sequence[int] = (4, 7, 3), **arguments: Any) -> InceptionV4:
    """An Inception v4.

    Args:
      stage_sizes: the numbers of the modules on the three grids.
      **arguments: of `InceptionV4`.

    Raises:
      UserError: if the arguments make no network.
    """
    sizes = checked_stage_sizes(stage_sizes, (4, 7, 3))
    return checked(InceptionV4(stage_sizes=sizes, **arguments), narrowest_gate=384)
