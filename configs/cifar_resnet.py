"""ResNets and plain nets on CIFAR (He 2015, arXiv 1512.03385, Section 4.2).

python -m resflax.main --config configs/cifar_resnet.py[:cifar10|cifar100]
    [--config.model.depth=110] [--config.model.shortcut=A|B|none]

64,000 steps of 128 images, a tenth of the rate from 32,000 and from 48,000 on. Published errors on
CIFAR-10 with shortcut A: 8.75 % (20 layers), 7.51 (32), 7.17 (44), 6.97 (56), 6.61 (110, which
began with a tenth of the rate for 400 steps); plain nets: about 9, 10, 12 and 14 (Figure 6).
Not run here: the data are not at hand.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import ml_collections

from resflax.config import ConfigError, base


def get_config(dataset: str = "cifar10") -> ml_collections.ConfigDict:
    """ResNet-20 with option A."""
    if dataset not in ("cifar10", "cifar100"):
        raise ConfigError(f"cifar_resnet.py has no settings for {dataset!r}: cifar10, cifar100.")
    config = base()
    config.model.name = "cifar_resnet20"
    config.model.shortcut = "A"
    config.model.depth = 20
    config.data.source = "tfds"
    config.data.tfds.name = dataset
    config.data.image_size = 32
    config.augment.crop_padding = 4
    config.augment.flip = True
    config.train.batch_size = 128
    config.train.epochs = 164.0
    config.optim.lr = 0.2  # 0.1 for 128 images
    config.optim.nesterov = False
    config.optim.schedule = "step"
    config.optim.step_epochs = (82.0, 123.0)
    return config


def sweep() -> Iterator[dict[str, Any]]:
    """Depth x shortcut, with the plain nets."""
    for depth, shortcut in itertools.product((20, 32, 44, 56, 110), ("A", "B", "none")):
        yield {"model.depth": depth, "model.shortcut": shortcut}
