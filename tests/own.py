"""A config file with a network, a loss, an optimizer and data of its own."""

import dataclasses

import flax.linen as nn
import jax
import optax

from resflax.config import base
from resflax.data import sources


class Net(nn.Module):
    """One convolution and a classifier."""

    num_classes: int
    width: int

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Conv(self.width, (4, 4), strides=4)(images)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(self.num_classes)(nn.relu(x).mean((1, 2)))


def focal(logits, targets):
    """Focal loss (Lin 2017, arXiv 1708.02002) of classes."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (1 - jax.numpy.exp(-nats)) ** 2 * nats


def get_config():
    config = base()
    config.model.update(name="net", width=4)
    config.data.update(source="shapes", image_size=16)
    config.data.shapes.update(num_train=64, num_test=50)
    config.train.update(batch_size=32, epochs=3.0)
    config.eval.batch_size = 32
    config.log.every_steps = 1
    return config


def get_model(config, num_classes):
    return Net(num_classes, config.model.width)


def get_loss(config):
    return focal


def get_optimizer(config, schedule):
    return optax.adamw(schedule)


def get_dataset(config):
    dataset = sources.load(config.data)
    return dataclasses.replace(
        dataset, description=dataclasses.replace(dataset.description, name="shapes of my own")
    )


def sweep():
    for width in (4, 6):
        yield {"model.width": width}
