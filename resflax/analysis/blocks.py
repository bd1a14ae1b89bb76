"""A residual network with other blocks, in the same stages, for about as many multiply-adds."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from resflax.models import Count, count
from resflax.models.resnet import ResNet

# Cardinality and base width of bottlenecks of equal cost (ResNeXt, arXiv 1611.05431, Table 2). The
# first is that of He 2015, arXiv 1512.03385, Figure 5, right.
CARDINALITIES = ((1, 64), (2, 40), (4, 24), (8, 14), (32, 4))


class Choice(NamedTuple):
    """What a network of one kind of blocks costs.

    Attributes:
      name: of the kind.
      block_name: of the block.
      block: a block of the first stage, one that does not change the shape if there is one.
      network: with such blocks.
    """

    name: str
    block_name: str
    block: Count
    network: Count


def measure(model: ResNet, image_shape: Sequence[int]) -> list[Choice]:
    """Counts a network with each kind of block, and as it is where that is none of them.

    Args:
      model: the network.
      image_shape: (H, W, C).
    """
    block_name = f"stage2_block{min(2, model.stage_sizes[0])}"
    choices = []
    for name, network in _networks(model).items():
        counted = count(network, image_shape)
        choices.append(Choice(name, block_name, counted.parts[block_name], counted))
    return choices


def _networks(model: ResNet) -> dict[str, ResNet]:
    own = (model.cardinality, model.base_width)
    kinds: list[dict[str, Any]] = [{"block": "basic", "cardinality": 1, "base_width": 64}]
    for cardinality, width in dict.fromkeys([*CARDINALITIES, own]):
        kinds.append({"block": "bottleneck", "cardinality": cardinality, "base_width": width})
    networks = {}
    for kind in kinds:
        network = model.clone(form="c", **kind)
        name = "basic"
        if network.block == "bottleneck":
            name = f"bottleneck {network.cardinality} x {network.base_width}d"
        own_kind = network == model.clone(form="c")
        networks[f"{name} (its own)" if own_kind else name] = network
    return networks
