"""A shortcut of one's own: ResNet-D's, which averages (He 2018, arXiv 1812.01187, Figure 2c).

The package has the same one as `shortcut="D"`.

python -m resflax.main --config docs/examples/resnet_d.py --workdir runs/resnet_d
python -m resflax.evaluate --workdir runs/resnet_d --config_file docs/examples/resnet_d.py
python -m launch.sweep --config docs/examples/resnet_d.py --workdir runs/resnet_d_or_b
"""

from collections.abc import Callable

import flax.linen as nn

import resflax
from resflax.config import base, model_overrides


class AveragedProjection(nn.Module):
    """Means of stride x stride pixels, then a 1x1 convolution, so that no pixel is skipped.

    Attributes:
      filters: channels of the result.
      stride: of the block.
      conv, norm: constructors of the network's layers.
    """

    filters: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        window = (self.stride, self.stride)
        x = nn.avg_pool(x, window, window, padding="SAME", count_include_pad=False)
        return self.norm(name="norm")(self.conv(self.filters, 1, name="conv")(x))


def get_config():
    config = base()
    config.model.update(name="cifar_resnet20", depth=8, num_filters=4, shortcut="averaged")
    config.data.update(source="digits", image_size=8)
    config.train.update(batch_size=64, epochs=10.0)
    config.optim.lr = 0.4
    return config


def get_model(config, num_classes):
    arguments = model_overrides(config)
    if config.model.shortcut == "averaged":
        arguments["shortcut"] = AveragedProjection
    return resflax.create_model(config.model.name, num_classes, **arguments)


def sweep():
    for shortcut in ("averaged", "B"):
        yield {"model.shortcut": shortcut}
