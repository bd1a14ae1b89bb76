"""An optimizer of one's own: AdamW, whose rate halves from each part of a network to the one below.

python -m resflax.main --config docs/examples/layerwise_adamw.py --workdir runs/layerwise
python -m resflax.evaluate --workdir runs/layerwise
python -m launch.sweep --config docs/examples/layerwise_adamw.py --workdir runs/layerwise_rates
"""

import jax
import optax

from resflax.config import base

FACTOR = 0.5  # of the rate, from a part to the one below it
PARTS = ("head", "stage4", "stage3", "stage2", "stem")


def get_config():
    config = base()
    config.model.update(name="cifar_resnet20", depth=8, num_filters=4)
    config.data.update(source="digits", image_size=8)
    config.train.update(batch_size=64, epochs=10.0)
    config.optim.update(lr=0.04, weight_decay=0.05)
    return config


def get_optimizer(config, schedule):
    """The schedule gives the rate of the head by step; PARTS[i] has it times FACTOR**i."""

    def scaled(path, update):
        part = path[0].key.partition("_")[0]
        return update * FACTOR ** PARTS.index(part)

    def by_part(updates, params):
        return jax.tree_util.tree_map_with_path(scaled, updates)

    adamw = optax.adamw(schedule, weight_decay=config.optim.weight_decay)
    return optax.chain(adamw, optax.stateless(by_part))


def sweep():
    for lr in (0.02, 0.04):
        yield {"optim.lr": lr}
