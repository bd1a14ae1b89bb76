"""A network that is small enough to look into in a test."""

import jax

from resflax.analysis import taps
from resflax.models import create_model


def network(**arguments):
    """ResNet-8 with 4 filters, changed by arguments; its variables, and six images of 16 pixels."""
    model = taps.written_out(create_model("cifar_resnet20", depth=8, num_filters=4, **arguments))
    images = jax.random.normal(jax.random.key(1), (6, 16, 16, 3))
    variables = jax.jit(lambda k, x: model.init(k, x, train=False))(jax.random.key(0), images)
    return model, variables, images
