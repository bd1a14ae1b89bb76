"""Inception-ResNet and Inception-v4 on ImageNet (Szegedy 2016, arXiv 1602.07261, Section 4).

python -m resflax.data prepare imagenet2012
python -m resflax.main --config configs/inception_resnet.py [--config.model.name=inception_v4]

RMSProp with a decay of 0.9 and an epsilon of 1, a rate of 0.045 for batches of 32 that falls by
0.94 every two epochs. Published errors of a single crop: Inception-ResNet-v2 19.9 % top-1 and 4.9 %
top-5, Inception-v4 20.0 % and 5.0 %. Not run here: the data are not at hand.
"""

from collections.abc import Iterator
from typing import Any

import ml_collections

from resflax.config import ConfigError, base


def get_config(dataset: str = "imagenet2012") -> ml_collections.ConfigDict:
    """Inception-ResNet-v2 on crops of 299 pixels, in bfloat16."""
    if dataset != "imagenet2012":
        raise ConfigError(f"inception_resnet.py has no settings for {dataset!r}: imagenet2012.")
    config = base()
    config.model.name = "inception_resnet_v2"
    config.model.dtype = "bfloat16"
    config.data.source = "tfds"
    config.data.tfds.name = dataset
    config.data.image_size = 299
    config.data.eval_resize = 342
    config.data.crop = "resized"
    config.augment.flip = True
    config.train.batch_size = 256
    config.train.epochs = 160.0
    config.train.label_smoothing = 0.1
    config.train.ema_decay = 0.9999
    config.optim.name = "rmsprop"
    config.optim.lr = 0.36  # 0.045 for 32 images
    config.optim.warmup_epochs = 5.0
    config.optim.schedule = "exponential"
    config.optim.decay_epochs = 2.0
    config.optim.step_factor = 0.94
    config.optim.momentum = 0.0
    config.optim.weight_decay = 4e-5
    return config


def sweep() -> Iterator[dict[str, Any]]:
    """The four networks of the paper."""
    for name in ("inception_v3", "inception_resnet_v1", "inception_v4", "inception_resnet_v2"):
        yield {"model.name": name}
