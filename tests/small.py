"""A run small enough for a test: 64 images of 16 pixels, 2 steps an epoch. Also a --config file."""

import ml_collections

from resflax.config import base


def get_config() -> ml_collections.ConfigDict:
    """SE-ResNeXt-11 for ten shapes."""
    small = base()
    small.model.name = "cifar_resnext29_8x64d"
    small.model.update(depth=11, num_filters=8, cardinality=4, base_width=32, se_reduction=4)
    small.data.source = "shapes"
    small.data.image_size = 16
    small.data.shapes.update(num_train=64, num_test=50)
    small.augment.update(crop_padding=2, flip=True)
    small.train.update(batch_size=32, epochs=2.0)
    small.eval.batch_size = 32
    small.log.every_steps = 1
    return small


def config(**overrides: object) -> ml_collections.ConfigDict:
    """The small run, changed by dotted fields: config(**{"train.epochs": 1.0})."""
    small = get_config()
    small.update_from_flattened_dict(overrides)
    return small
