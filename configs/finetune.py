"""Fine-tuning on a directory of images: FOLDER/train/CLASS/*.jpg and FOLDER/val/, or FOLDER/CLASS/.

python -m resflax.main --config configs/finetune.py --config.data.folder.path=FOLDER
    --config.init_from=WEIGHTS [--config.model.name=resnet50] [--config.train.trainable=head]

WEIGHTS is a .safetensors file of torchvision or timm for that network, an .h5 or .hdf5 file of
Keras, or the directory of a run; the classifier is new. `trainable` is a regular expression: 'head'
trains the classifier alone, 'stage5|head' the last stage too, '.*' everything; what is not trained
keeps its parameters and its batch statistics.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import ml_collections

from resflax.config import ConfigError, base


def get_config(dataset: str = "folder") -> ml_collections.ConfigDict:
    """A ResNet-50 on images of 224 pixels, all of it trained at a small rate."""
    if dataset != "folder":
        raise ConfigError(f"finetune.py has no settings for {dataset!r}: folder.")
    config = base()
    config.model.name = "resnet50"
    config.data.source = "folder"
    config.data.image_size = 224
    # What the weights of torchvision and timm were trained with.
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.augment.flip = True
    config.augment.crop_padding = 16
    config.train.batch_size = 32
    config.train.epochs = 10.0
    config.train.label_smoothing = 0.1
    config.optim.lr = 0.02
    config.optim.warmup_epochs = 1.0
    config.eval.batch_size = 32
    return config


def sweep() -> Iterator[dict[str, Any]]:
    """How much is trained x how fast."""
    for trainable, lr in itertools.product(("head", "stage5|head", ".*"), (0.02, 0.1)):
        yield {"train.trainable": trainable, "optim.lr": lr}
