"""ResNet for small images (He 2015, arXiv 1512.03385, Section 4.2).

python -m resflax.main --config configs/resnet.py[:digits|shapes|fashion_mnist]
    [--config.model.shortcut=A]

digits: 99.17 +- 0.56 % top-1 after the last epoch with B, mean and standard deviation of the seeds
0, 1 and 2 on one processor (too easy a set to tell shortcuts apart); 25 s on 2 CPU cores, compiling
included.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import ml_collections

from resflax.config import ConfigError, base


def get_config(dataset: str = "digits") -> ml_collections.ConfigDict:
    """ResNet-20 with option B; A and 'none' (the plain net) are one override away."""
    config = base()
    config.model.name = "cifar_resnet20"
    config.model.shortcut = "B"
    config.model.depth = 20
    config.data.source = dataset
    config.optim.warmup_epochs = 1.0
    if dataset == "digits":
        config.data.image_size = 16
        config.augment.crop_padding = 2
        config.train.batch_size = 64
        config.train.epochs = 20.0
        config.optim.lr = 0.2
    elif dataset == "shapes":
        config.data.image_size = 32
        config.train.batch_size = 32
        config.train.epochs = 10.0
        config.optim.lr = 0.4
    elif dataset == "fashion_mnist":  # prepared as configs/fashion_mnist.py says
        config.data.source = "arrays"
        config.data.arrays.path = "fashion_mnist"
        config.data.image_size = 28
        config.train.batch_size = 64
        config.train.epochs = 2.0
        config.optim.warmup_epochs = 0.25
        config.optim.lr = 0.4
    else:
        raise ConfigError(
            f"resnet.py has no settings for {dataset!r}: digits, shapes, fashion_mnist."
        )
    return config


def sweep() -> Iterator[dict[str, Any]]:
    """Depth x shortcut: the degradation of plain nets, and what the identity does about it."""
    for depth, shortcut in itertools.product((20, 32, 44, 56), ("A", "B", "none")):
        yield {"model.depth": depth, "model.shortcut": shortcut}
