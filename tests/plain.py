"""The small run with the smallest network, which compiles fastest. Also a --config file."""

import ml_collections

from tests import small


def get_config() -> ml_collections.ConfigDict:
    """ResNet-8 with 4 filters for ten shapes."""
    plain = small.get_config()
    plain.model.name = "cifar_resnet20"
    plain.model.update(depth=8, num_filters=4)
    plain.model.update(cardinality=None, base_width=None, se_reduction=None)
    return plain


def config(**overrides: object) -> ml_collections.ConfigDict:
    """The plain run, changed by dotted fields: config(**{"train.epochs": 1.0})."""
    plain = get_config()
    plain.update_from_flattened_dict(overrides)
    return plain
