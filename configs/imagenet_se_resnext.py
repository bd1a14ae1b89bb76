"""SE-ResNeXt on ImageNet (Hu 2017, arXiv 1709.01507, Section 5).

python -m resflax.data prepare imagenet2012
python -m resflax.main --config configs/imagenet_se_resnext.py [--config.model.depth=101]

100 epochs of 1024 images, a tenth of the rate every 30; published errors of the 224-pixel center
crop: SE-ResNeXt-50 (32 x 4d) 21.10 % top-1 and 5.49 % top-5, SE-ResNeXt-101 20.70 % and 5.01 %.
Not run here: the data are not at hand.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import ml_collections

from resflax.config import ConfigError, base


def get_config(dataset: str = "imagenet2012") -> ml_collections.ConfigDict:
    """SE-ResNeXt-50 (32 x 4d) on crops of 224 pixels, in bfloat16."""
    if dataset != "imagenet2012":
        raise ConfigError(f"imagenet_se_resnext.py has no settings for {dataset!r}: imagenet2012.")
    config = base()
    config.model.name = "se_resnext50_32x4d"
    config.model.depth = 50
    config.model.cardinality = 32
    config.model.base_width = 4
    config.model.se_reduction = 16
    config.model.dtype = "bfloat16"
    config.data.source = "tfds"
    config.data.tfds.name = dataset
    config.data.image_size = 224
    config.data.eval_resize = 256
    config.data.crop = "resized"
    config.augment.flip = True
    config.train.batch_size = 1024
    config.train.epochs = 100.0
    config.optim.lr = 0.15  # 0.6 for 1024 images
    config.optim.schedule = "step"
    config.optim.step_epochs = (30.0, 60.0, 90.0)
    return config


def sweep() -> Iterator[dict[str, Any]]:
    """Depth x cardinality at equal cost x reduction of the gates (0: none)."""
    for depth, (cardinality, base_width), se_reduction in itertools.product(
        (50, 101), ((1, 64), (4, 24), (8, 14), (32, 4)), (0, 8, 16, 32)
    ):
        yield {
            "model.depth": depth,
            "model.cardinality": cardinality,
            "model.base_width": base_width,
            "model.se_reduction": se_reduction,
        }
