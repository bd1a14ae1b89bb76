"""SE-ResNeXt (arXiv 1709.01507, 1611.05431), small enough for a laptop.

    python -m resflax.main --config configs/se_resnext.py[:digits|shapes]
"""

from collections.abc import Iterator
import itertools
from typing import Any

import ml_collections

from resflax.config import ConfigError, base


def get_config(dataset: str = "digits") -> ml_collections.ConfigDict:
    config = base()
    config.model.name = "se_resnext50_32x4d"
    config.model.depth = 26
    config.model.stem = "cifar"
    config.model.num_filters = 16
    config.model.cardinality = 8
    config.model.base_width = 16
    config.model.se_reduction = 4
    config.data.source = dataset
    config.augment.crop_padding = 2
    config.train.batch_size = 64
    config.train.label_smoothing = 0.1
    config.optim.lr = 0.2
    config.optim.warmup_epochs = 2.0
    config.optim.weight_decay = 5e-4
    return config
