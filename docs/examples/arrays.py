"""Data of one's own: arrays from memory, of digits that are turned (1803.07728, Section 3).

python -m resflax.main --config docs/examples/arrays.py --workdir runs/turned
python -m resflax.evaluate --workdir runs/turned --config_file docs/examples/arrays.py
python -m launch.sweep --config docs/examples/arrays.py --workdir runs/turned_shares
"""

import numpy as np
from sklearn import datasets

from resflax.config import base


def get_config():
    config = base()
    config.model.update(name="cifar_resnet20", depth=8, num_filters=4)
    config.data.source = "given"
    config.train.update(batch_size=64, epochs=5.0)
    config.optim.lr = 0.4
    return config


def get_dataset(config):
    """Images are uint8, [N, H, W] or [N, H, W, C]; labels are integers from 0, [N]."""
    digits = np.round(datasets.load_digits().images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    train, test = digits[:1400], digits[1400:]
    return {
        "train_images": np.concatenate([np.rot90(train, turn, (1, 2)) for turn in range(4)]),
        "train_labels": np.repeat(range(4), len(train)),
        "test_images": np.concatenate([np.rot90(test, turn, (1, 2)) for turn in range(4)]),
        "test_labels": np.repeat(range(4), len(test)),
        "label_names": ["upright", "left", "upside down", "right"],
    }


def sweep():
    for share in (0.1, 1.0):
        yield {"data.train_share": share}
