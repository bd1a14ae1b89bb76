"""What may stand on the identity path, and the order of the unit (He 2016, arXiv 1603.05027).

python -m resflax.main --config configs/identity_mappings.py[:cifar10|cifar100|shapes]
    [--config.model.unit=original] [--config.model.skip=shortcut_gating]

Published errors on CIFAR-10: ResNet-110 6.61 % (original) and 6.37 (full pre-activation); 164
layers 5.93 and 5.46; 1001 layers 7.61 and 4.92. With ResNet-110 the scaled, gated and convolved
shortcuts of Table 1 end between 8.70 % and failure (over 90 %). Not run here on CIFAR: the data are
not at hand. On shapes, docs/why_residual.md has two of the units.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import ml_collections

from resflax.config import ConfigError, base


def get_config(dataset: str = "cifar10") -> ml_collections.ConfigDict:
    """ResNet-164 with full pre-activation; the first epoch warms up, as the paper's 400 steps."""
    config = base()
    config.model.name = "cifar_preact_resnet164"
    config.model.depth = 164
    config.model.block = "bottleneck"
    config.model.unit = "full_preact"
    config.optim.warmup_epochs = 1.0
    if dataset in ("cifar10", "cifar100"):
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
    elif dataset == "shapes":  # with half as many filters, for a laptop
        config.model.num_filters = 8
        config.data.source = "shapes"
        config.data.image_size = 16
        config.data.shapes.difficulty = 0.0
        config.data.shapes.num_test = 2000
        config.train.batch_size = 32
        config.train.epochs = 6.0
        config.optim.lr = 0.4
    else:
        raise ConfigError(
            f"identity_mappings.py has no settings for {dataset!r}: cifar10, cifar100, shapes."
        )
    return config


def sweep() -> Iterator[dict[str, Any]]:
    """Depth x order of the unit (Tables 2 and 3): basic blocks, and deeper ones of three layers."""
    units = (
        "original",
        "bn_after_addition",
        "relu_before_addition",
        "relu_only_preact",
        "full_preact",
    )
    for (depth, block), unit in itertools.product(((110, "basic"), (164, "bottleneck")), units):
        yield {"model.depth": depth, "model.block": block, "model.unit": unit}
