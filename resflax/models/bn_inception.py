"""BN-Inception (Ioffe and Szegedy 2015, arXiv 1502.03167), also with squeeze-excite gates."""

import dataclasses
import functools
from typing import Any, ClassVar

from resflax.errors import UserError
from resflax.models import checks
from resflax.models.inception import (
    CEIL_MAX_POOL,
    SAME_MAX_POOL,
    Conv,
    InceptionNet,
    Layers,
    Part,
    Spec,
    chain,
    checked,
    mixed,
)
from resflax.ops import pool

# Caffe counts the zeros around the image.
_AVG_POOL = functools.partial(pool.avg_pool, window=3, stride=1, padding=1, count_padding=True)
# Caffe's windows, and one more where the size is odd: as many as the convolutions beside it have.
_PASS_POOL = functools.partial(pool.max_pool, window=3, stride=2, padding=(0, 2))


def _module(
    n1: int, n3: tuple[int, int], n33: tuple[int, int], projection: int, pooling: Spec
) -> Part:
    """Branches of a 1x1, a 3x3, two 3x3 convolutions, a pool: reductions, then the layers' own."""
    return mixed(
        (Conv(n1),),
        (Conv(n3[0]), Conv(n3[1], 3)),
        (Conv(n33[0]), Conv(n33[1], 3), Conv(n33[1], 3)),
        (pooling, Conv(projection)),
    )


def _reduction(n3: tuple[int, int], n33: tuple[int, int]) -> Part:
    """Halves the image: no 1x1 branch, and the pool passes its input through unprojected."""
    return mixed(
        (Conv(n3[0]), Conv(n3[1], 3, 2)),
        (Conv(n33[0]), Conv(n33[1], 3), Conv(n33[1], 3, 2)),
        (_PASS_POOL,),
    )


class BNInception(InceptionNet):
    """BN-Inception: ten modules with two 3x3 convolutions for a 5x5 (1502.03167, Figure 5).

    Squeeze-excite gates stand after every module (SE, 1709.01507, Figure 2).

    Attributes:
      conv_bias: 'all': biases in the convolutions before the norms, as some Caffe models have;
        'none'.
      width_4cd: channels out of modules 4c and 4d: 608 in the released Caffe models, 576 in
        TensorFlow-slim. Only the projections after their pools differ.

    The other attributes are those of InceptionNet.
    """

    conv_bias: str | bool = "none"
    width_4cd: int = 608
    bn_epsilon: float = 1e-5

    # Every layer is padded, so less would run; but nothing but padding would be seen.
    smallest_image: ClassVar[int] = 32

    def parts(self) -> dict[str, Part]:
        """The stem and ten modules; 3c and 4e halve the image."""
        projection = self.width_4cd - 480
        return {
            "stem": chain(Conv(64, 7, 2), CEIL_MAX_POOL, Conv(64), Conv(192, 3), CEIL_MAX_POOL),
            "inception_3a": _module(64, (64, 64), (64, 96), 32, _AVG_POOL),
            "inception_3b": _module(64, (64, 96), (64, 96), 64, _AVG_POOL),
            "inception_3c": _reduction((128, 160), (64, 96)),
            "inception_4a": _module(224, (64, 96), (96, 128), 128, _AVG_POOL),
            "inception_4b": _module(192, (96, 128), (96, 128), 128, _AVG_POOL),
            "inception_4c": _module(160, (128, 160), (128, 160), projection, _AVG_POOL),
            "inception_4d": _module(96, (128, 192), (160, 192), projection, _AVG_POOL),
            "inception_4e": _reduction((128, 192), (192, 256)),
            "inception_5a": _module(352, (192, 320), (160, 224), 128, _AVG_POOL),
            "inception_5b": _module(352, (192, 320), (192, 224), 128, SAME_MAX_POOL),
        }

    def layers(self, train: bool) -> Layers:
        """Convolutions with biases where asked for."""
        layers = super().layers(train)
        conv = functools.partial(layers.conv, use_bias=self.conv_bias == "all")
        return dataclasses.replace(layers, conv=conv)


def bn_inception(**arguments: Any) -> BNInception:
    """A BN-Inception: that of the released Caffe models, unless its arguments say otherwise.

    Args:
      **arguments: of `BNInception`; a `conv_bias` that is true or false is 'all' or 'none'.

    Raises:
      UserError: if the arguments make no network.
    """
    if isinstance(arguments.get("conv_bias"), bool):
        arguments["conv_bias"] = "all" if arguments["conv_bias"] else "none"
    model = checked(BNInception(**arguments), narrowest_gate=256)
    checks.choices(model, {"conv_bias": ("none", "all")})
    if model.width_4cd <= 480:
        raise UserError(
            f"width_4cd {model.width_4cd} must be more than 480, the channels of the branches "
            "without a pool: 608 (Caffe's) or 576 (TensorFlow-slim's)."
        )
    return model
