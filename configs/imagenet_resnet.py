"""ResNets on ImageNet, 90 epochs (Goyal 2017, arXiv 1706.02677, after fb.resnet.torch).

python -m resflax.data prepare imagenet2012
python -m resflax.main --config configs/imagenet_resnet.py [--config.model.depth=101]

Published top-1 error of the center crop: ResNet-50 23.6 % at this length and batch; the papers'
own figures are in the README's list. Not run here: the data are not at hand.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import ml_collections

from resflax.config import ConfigError, base


def get_config(dataset: str = "imagenet2012") -> ml_collections.ConfigDict:
    """ResNet-50 on crops of 224 pixels, in bfloat16."""
    if dataset != "imagenet2012":
        raise ConfigError(f"imagenet_resnet.py has no settings for {dataset!r}: imagenet2012.")
    config = base()
    config.model.name = "resnet50"
    config.model.depth = 50
    config.model.dtype = "bfloat16"
    config.model.zero_init_last = True
    config.data.source = "tfds"
    config.data.tfds.name = dataset
    config.data.image_size = 224
    config.data.eval_resize = 256
    config.data.crop = "resized"
    config.augment.flip = True
    config.train.batch_size = 256
    config.train.epochs = 90.0
    config.optim.lr = 0.1
    config.optim.warmup_epochs = 5.0
    config.optim.schedule = "step"
    config.optim.step_epochs = (30.0, 60.0, 80.0)
    return config


def sweep() -> Iterator[dict[str, Any]]:
    """Depth x shortcut."""
    for depth, shortcut in itertools.product((18, 34, 50, 101, 152), ("A", "B", "C")):
        yield {"model.depth": depth, "model.shortcut": shortcut}
