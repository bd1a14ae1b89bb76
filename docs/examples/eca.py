"""A gate of one's own: Efficient Channel Attention (Wang 2019, arXiv 1910.03151, Section 3.2).

python -m resflax.main --config docs/examples/eca.py --workdir runs/eca
python -m resflax.evaluate --workdir runs/eca --config_file docs/examples/eca.py
python -m resflax.analyze excitation --workdir runs/eca --config_file docs/examples/eca.py
python -m launch.sweep --config docs/examples/eca.py --workdir runs/eca_kernels
"""

import functools
import math

import flax.linen as nn

import resflax
from resflax.config import base, model_overrides
from resflax.models.gates import Gate


class ECA(Gate):
    """Each channel's gate is computed from the means of its nearest neighbours.

    Attributes:
      kernel: channels that a gate is computed from; 0: as many as Equation 12 has.
    """

    kernel: int = 0

    @nn.compact
    def gates(self, x):
        """[N, H, W, C] -> [N, C]; the class Gate multiplies by them."""
        size = self.kernel or int((math.log2(x.shape[-1]) + 1) / 2) | 1
        means = x.mean((1, 2))[..., None]
        return nn.sigmoid(nn.Conv(1, (size,), use_bias=False, name="conv")(means)[..., 0])


def get_config():
    config = base()
    config.model.update(name="cifar_resnet20", depth=8, num_filters=4, kernel=0)
    config.data.update(source="digits", image_size=8)
    config.train.update(batch_size=64, epochs=10.0)
    config.optim.lr = 0.4
    return config


def get_model(config, num_classes):
    arguments = model_overrides(config)
    gate = functools.partial(ECA, kernel=arguments.pop("kernel"))
    return resflax.create_model(config.model.name, num_classes, gate=gate, **arguments)


def sweep():
    for kernel in (0, 3):
        yield {"model.kernel": kernel}
