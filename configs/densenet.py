"""DenseNets on CIFAR (Huang 2017, arXiv 1608.06993, Section 4.2).

python -m resflax.main --config configs/densenet.py[:cifar10|cifar100]
    [--config.model.name=cifar_densenet40_k12]

300 epochs of 64 images. Published errors with augmentation on CIFAR-10 and CIFAR-100: DenseNet-BC
100 (k = 12) 4.51 % and 22.27 %, 250 (k = 24) 3.62 % and 17.60 %, 190 (k = 40) 3.46 % and 17.18 %,
DenseNet 40 (k = 12) 5.24 % and 24.42 %. Not run here: the data are not at hand.
"""

from collections.abc import Iterator
from typing import Any

import ml_collections

from resflax.config import ConfigError, base


def get_config(dataset: str = "cifar10") -> ml_collections.ConfigDict:
    """DenseNet-BC of 100 layers with a growth rate of 12."""
    if dataset not in ("cifar10", "cifar100"):
        raise ConfigError(f"densenet.py has no settings for {dataset!r}: cifar10, cifar100.")
    config = base()
    config.model.name = "cifar_densenet_bc100_k12"
    config.data.source = "tfds"
    config.data.tfds.name = dataset
    config.data.image_size = 32
    config.augment.crop_padding = 4
    config.augment.flip = True
    config.train.batch_size = 64
    config.train.epochs = 300.0
    config.optim.lr = 0.4  # 0.1 for 64 images
    config.optim.schedule = "step"
    config.optim.step_epochs = (150.0, 225.0)
    return config


def sweep() -> Iterator[dict[str, Any]]:
    """The networks of Table 2 that train with augmentation."""
    names = "densenet40_k12", "densenet100_k12", "densenet100_k24", "densenet_bc100_k12"
    for name in (*names, "densenet_bc250_k24", "densenet_bc190_k40"):
        yield {"model.name": f"cifar_{name}"}
