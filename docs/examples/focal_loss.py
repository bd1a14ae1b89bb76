"""A loss of one's own: the focal loss (Lin 2017, arXiv 1708.02002, Equation 4).

The package has the same one as `config.loss.name = "focal"`.

python -m resflax.main --config docs/examples/focal_loss.py --workdir runs/focal
python -m resflax.evaluate --workdir runs/focal
python -m launch.sweep --config docs/examples/focal_loss.py --workdir runs/focal_gammas
"""

import jax.numpy as jnp
import optax

from resflax.config import base


def get_config():
    config = base()
    config.model.update(name="cifar_resnet20", depth=8, num_filters=4)
    config.data.update(source="digits", image_size=8)
    config.train.update(batch_size=64, epochs=10.0)
    config.optim.lr = 0.4
    config.loss.name = "focal"  # whose field is borrowed
    config.loss.focal.gamma = 2.0
    return config


def get_loss(config):
    gamma = config.loss.focal.gamma

    def focal(logits, targets):
        """Logits [N, K] and classes [N] -> (1 - p)^gamma times the cross-entropy, [N]."""
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return (1 - jnp.exp(-nats)) ** gamma * nats

    return focal


def sweep():
    for gamma in (1.0, 2.0):
        yield {"loss.focal.gamma": gamma}
