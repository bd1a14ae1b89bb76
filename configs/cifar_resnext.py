"""ResNeXt on CIFAR (Xie 2017, arXiv 1611.05431, Section 5.3).

python -m resflax.main --config configs/cifar_resnext.py[:cifar10|cifar100]
    [--config.model.cardinality=16] [--config.model.se_reduction=16]

300 epochs of 128 images; published errors of ResNeXt-29 on CIFAR-10 and CIFAR-100: 3.65 % and
17.77 % (8 x 64d), 3.58 % and 17.31 % (16 x 64d). Not run here: the data are not at hand.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import ml_collections

from resflax.config import ConfigError, base


def get_config(dataset: str = "cifar10") -> ml_collections.ConfigDict:
    """ResNeXt-29, 8 x 64d."""
    if dataset not in ("cifar10", "cifar100"):
        raise ConfigError(f"cifar_resnext.py has no settings for {dataset!r}: cifar10, cifar100.")
    config = base()
    config.model.name = "cifar_resnext29_8x64d"
    config.model.cardinality = 8
    config.model.base_width = 64
    config.data.source = "tfds"
    config.data.tfds.name = dataset
    config.data.image_size = 32
    config.augment.crop_padding = 4
    config.augment.flip = True
    config.train.batch_size = 128
    config.train.epochs = 300.0
    config.optim.lr = 0.2  # 0.1 for 128 images
    config.optim.weight_decay = 5e-4
    config.optim.schedule = "step"
    config.optim.step_epochs = (150.0, 225.0)
    return config


def sweep() -> Iterator[dict[str, Any]]:
    """Cardinality against width at equal cost (Figure 7), with and without gates."""
    shapes = (1, 192), (2, 128), (4, 96), (8, 64)
    for (cardinality, base_width), se_reduction in itertools.product(shapes, (0, 16)):
        yield {
            "model.cardinality": cardinality,
            "model.base_width": base_width,
            "model.se_reduction": se_reduction,
        }
