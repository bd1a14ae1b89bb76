"""ResNet-50 on ImageNet by what has been learned since: long, with strong augmentation.

python -m resflax.data prepare imagenet2012
python -m resflax.main --config configs/imagenet_resnet_modern.py

After "ResNet strikes back" (Wightman 2021, arXiv 2110.00476) and torchvision's second weights, with
SGD: mixup, CutMix, RandAugment, smoothed labels, erasing, averaged parameters, smaller images to
train on than to evaluate on. torchvision reports 80.86 % top-1 after 600 epochs, with another
choice of augmentation. Not run here: the data are not at hand.
"""

from collections.abc import Iterator
from typing import Any

import ml_collections

from resflax.config import ConfigError, base


def get_config(dataset: str = "imagenet2012") -> ml_collections.ConfigDict:
    """ResNet-50, 300 epochs."""
    if dataset != "imagenet2012":
        raise ConfigError(
            f"imagenet_resnet_modern.py has no settings for {dataset!r}: imagenet2012."
        )
    config = base()
    config.model.name = "resnet50"
    config.model.dtype = "bfloat16"
    config.model.zero_init_last = True
    config.data.source = "tfds"
    config.data.tfds.name = dataset
    config.data.image_size = 224
    config.data.eval_resize = 236
    config.data.crop = "resized"
    config.augment.flip = True
    config.augment.rand_augment_layers = 2
    config.augment.rand_augment_magnitude = 7.0
    config.augment.erasing = 0.1
    config.mix.mixup = 0.2
    config.mix.cutmix = 1.0
    config.train.batch_size = 1024
    config.train.epochs = 300.0
    config.train.label_smoothing = 0.1
    config.train.ema_decay = 0.9999
    config.optim.lr = 0.125  # 0.5 for 1024 images
    config.optim.warmup_epochs = 5.0
    config.optim.weight_decay = 2e-5
    config.optim.decay_norm_and_bias = False
    return config


def sweep() -> Iterator[dict[str, Any]]:
    """What each part of the augmentation is worth: all of it, and one part less."""
    yield {}
    for field in ("rand_augment_layers", "erasing"):
        yield {f"augment.{field}": 0}
    for field in ("mixup", "cutmix"):
        yield {f"mix.{field}": 0.0}
