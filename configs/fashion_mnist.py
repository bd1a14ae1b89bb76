"""Fashion-MNIST as published with random erasing (Zhong 2017, arXiv 1708.04896).

apt-get install dataset-fashion-mnist
python -m resflax.data prepare fashion_mnist --from /usr/share/datasets/fashion-mnist
python -m resflax.main --config configs/fashion_mnist.py[:fashion_mnist|tfds]
    [--config.augment.erasing=0.5]

300 epochs of 128 images. Published test errors of the best epoch without and with erasing, in the
order of `sweep`: 4.39 and 4.02 %, 4.16 and 3.80, 4.41 and 4.01, 4.39 and 4.13, 4.40 and 4.01, 4.01
and 3.65.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import ml_collections

from resflax.config import ConfigError, base


def get_config(dataset: str = "fashion_mnist") -> ml_collections.ConfigDict:
    """ResNet-20 with option B, without erasing."""
    if dataset not in ("fashion_mnist", "tfds"):
        raise ConfigError(f"fashion_mnist.py has no settings for {dataset!r}: fashion_mnist, tfds.")
    config = base()
    config.model.name = "cifar_resnet20"
    config.model.shortcut = "B"
    config.data.source = "arrays" if dataset == "fashion_mnist" else "tfds"
    config.data.arrays.path = "fashion_mnist"  # from its files
    config.data.tfds.name = "fashion_mnist"  # downloaded
    config.data.image_size = 28
    config.data.mean = (0.1307,)
    config.data.std = (0.3081,)
    config.augment.crop_padding = 4
    config.augment.flip = True
    config.augment.erasing_value = 0.4914  # after normalisation, as in that code
    config.train.batch_size = 128
    config.train.epochs = 300.0
    config.optim.lr = 0.2  # 0.1 for 128 images
    config.optim.nesterov = False
    config.optim.weight_decay = 5e-4
    config.optim.schedule = "step"
    config.optim.step_epochs = (150.0, 225.0)
    return config


def sweep() -> Iterator[dict[str, Any]]:
    """All six networks, without and with random erasing.

    What that code calls ResNet-44, 56 and 110 are bottleneck networks with as many blocks as basic
    ones of those depths have: 65, 83 and 164 layers.
    """
    networks: list[dict[str, Any]] = [{"model.depth": depth} for depth in (20, 32)]
    networks += [{"model.depth": depth, "model.block": "bottleneck"} for depth in (65, 83, 164)]
    networks.append({"model.name": "wrn28_10", "model.shortcut": None})
    for network, erasing in itertools.product(networks, (0.0, 0.5)):
        yield network | {"augment.erasing": erasing}
