"""SE-ResNeXt (arXiv 1611.05431 with the gates of 1709.01507), small enough for a laptop.

python -m resflax.main --config configs/se_resnext.py[:digits|shapes]

digits: 358 to 360 of the 360 test images (99.44 to 100 % top-1) after the last epoch: 99.72 +-
0.28 % with the seeds 0, 1 and 2 on one processor, 99.44 % with 0 and 1 on another (an EPYC without
AVX-512); 40 to 153 s on 2 shared CPU cores, compiling included.
shapes: 80.5 % with seed 0; results/sweep_shapes has the sweep, 29 minutes on the same.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import ml_collections

from resflax.config import ConfigError, base


def get_config(dataset: str = "digits") -> ml_collections.ConfigDict:
    """SE-ResNeXt for images of 16 pixels: for digits 26 layers of 8 x 16d (at 64 filters; 16 here),
    for shapes 14 of 4 x 24d (8 filters here).
    """
    config = base()
    config.model.name = "se_resnext50_32x4d"
    config.model.depth = 26
    config.model.stem = "cifar"
    config.model.num_filters = 16
    config.model.cardinality = 8
    config.model.base_width = 16
    config.model.se_reduction = 4
    config.data.source = dataset
    config.train.label_smoothing = 0.1
    config.optim.warmup_epochs = 2.0
    config.optim.weight_decay = 5e-4
    if dataset == "digits":
        config.data.image_size = 16
        config.augment.crop_padding = 2
        config.train.batch_size = 64
        config.train.epochs = 20.0
        config.optim.lr = 0.2
    elif dataset == "shapes":
        config.data.image_size = 16
        config.data.shapes.difficulty = 0.0
        config.data.shapes.num_test = 2000
        config.model.depth = 14
        config.model.num_filters = 8
        config.model.cardinality = 4
        config.model.base_width = 24
        config.train.batch_size = 32
        config.train.epochs = 5.0
        config.optim.warmup_epochs = 1.0
        config.optim.lr = 0.4
    else:
        raise ConfigError(f"se_resnext.py has no settings for {dataset!r}: digits, shapes.")
    return config


def sweep() -> Iterator[dict[str, Any]]:
    """Depth x cardinality x reduction of the gates (0: none) x shortcut.

    Cardinality as in Table 2 of the ResNeXt paper: blocks of equal parameters, (64, 80 or 96)
    filters wide where the network's 64 are.
    """
    for depth, (cardinality, base_width), se_reduction, shortcut in itertools.product(
        (14, 26), ((1, 64), (2, 40), (4, 24)), (0, 4), ("A", "B")
    ):
        yield {
            "model.depth": depth,
            "model.cardinality": cardinality,
            "model.base_width": base_width,
            "model.se_reduction": se_reduction,
            "model.shortcut": shortcut,
        }
