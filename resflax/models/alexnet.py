"""AlexNet: the network of 2012, and the one of "One weird trick" (arXiv 1404.5997).

Krizhevsky, Sutskever, Hinton: ImageNet Classification with Deep Convolutional Neural Networks,
NeurIPS 2012. Both are one network, `AlexNet`, with arguments.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resflax.errors import UserError
from resflax.models import checks, layers
from resflax.ops import activation, lrn, pool

# Side of the kernel of each convolution, and which of them a 3x3/2 max-pool follows.
KERNEL_SIZES = (11, 5, 3, 3, 3)
POOLED = ("conv1", "conv2", "conv5")

# The two halves of the network met in conv3 alone, among the convolutions after the first; the
# layers that began with biases are those whose inputs are mostly positive (Section 5).
GROUPED = ("conv2", "conv4", "conv5")
BIASED = (*GROUPED, "fc6", "fc7")

# The side of the maps that fc6 was published on.
MAP_SIZE = 6

INITS = layers.INITS | {"torch_uniform": layers.torch_uniform}


class AlexNet(nn.Module):
    """An AlexNet, from images to logits.

    Variables: 'params'; random numbers: 'dropout' where `dropout` is not zero and `train` is true.

    Attributes:
      num_classes: units of the classifier.
      widths: output channels of the five convolutions.
      fc_units: of the two hidden dense layers.
      groups: halves of conv2, conv4 and conv5, which were one GPU's each; 1: undivided.
      stem_padding: zeros around the images, pixels.
      lrn: whether local response normalisation follows the ReLUs of conv1 and conv2, before the
        pools (Section 3.3: n = 5, k = 2, alpha = 1e-4, not divided by n, beta = 0.75).
      bias: initial, of conv2, conv4, conv5, fc6 and fc7: 1 in Section 5. Caffe's replication
        starts them at 0.1, "as initialization to 1 gave flat loss".
      kernel_init: of all kernels; a name in layers.INITS, or 'torch_uniform', which is PyTorch's.
      dropout: rate, in training.
      dropped: the dense layers whose input has dropout: those of the two hidden layers' outputs in
        Section 4.2, those of the two hidden layers in torchvision.
      dtype: of the computation. Parameters and logits are float32.
    """

    num_classes: int = 1000
    widths: Sequence[int] = (96, 256, 384, 384, 256)
    fc_units: int = 4096
    groups: int = 2
    stem_padding: int = 0
    lrn: bool = True
    bias: float = 1.0
    kernel_init: str = "gaussian"
    dropout: float = 0.5
    dropped: Sequence[str] = ("fc7", "head")
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, features: bool = False
    ) -> jax.Array | dict[str, jax.Array]:
        """Computes logits.

        Args:
          images: float [N, H, W, C], normalised; of 227 pixels without padding in the stem (the
            paper says 224, which does not give its 55x55 maps), of 224 pixels with 2. Maps of
            other sizes are averaged to 6x6 before fc6.
          train: whether dropout drops.
          features: whether to return what comes out of every part of the network.

        Returns:
          float32 [N, num_classes]; with `features`, that and what is before it by name: 'conv1' to
          'conv5' [N, H', W', C'], after their ReLUs, 'fc6' and 'fc7' [N, fc_units], 'logits'.

        Raises:
          UserError: if `images` has not four axes, or is too small for the max-pools.
        """
        self._check_images(images)
        conv = functools.partial(
            layers.Conv, use_bias=True, kernel_init=INITS[self.kernel_init], dtype=self.dtype
        )
        dense = functools.partial(nn.Dense, kernel_init=INITS[self.kernel_init])
        outputs = {}
        x = images
        for i, (filters, size) in enumerate(zip(self.widths, KERNEL_SIZES, strict=True), start=1):
            name = f"conv{i}"
            x = conv(filters, size, **self._conv_settings(name), name=name)(x)
            x = outputs[name] = activation.relu(x)
            x = lrn.local_response_norm(x) if self.lrn and i <= 2 else x
            x = pool.max_pool(x, 3, 2, (0, 0)) if name in POOLED else x
        x = pool.adaptive_avg_pool(x, MAP_SIZE).reshape(x.shape[0], -1)
        for name in ("fc6", "fc7"):
            x = self._drop(name, x, train)
            bias_init = self._bias_init(name)
            x = dense(self.fc_units, bias_init=bias_init, dtype=self.dtype, name=name)(x)
            x = outputs[name] = activation.relu(x)
        x = self._drop("head", x, train)
        outputs["logits"] = dense(self.num_classes, dtype=jnp.float32, name="head")(x)
        return outputs if features else outputs["logits"]

    def _conv_settings(self, name: str) -> dict[str, Any]:
        settings: dict[str, Any] = {"bias_init": self._bias_init(name)}
        if name == "conv1":
            settings |= {"stride": 4, "padding": (self.stem_padding, self.stem_padding)}
        if name in GROUPED:
            settings["groups"] = self.groups
        return settings

    def _bias_init(self, name: str) -> nn.initializers.Initializer:
        return nn.initializers.constant(self.bias if name in BIASED else 0.0)

    def _drop(self, name: str, x: jax.Array, train: bool) -> jax.Array:
        if name not in self.dropped:
            return x
        return nn.Dropout(self.dropout, deterministic=not train, name=f"dropout_{name}")(x)

    def _check_images(self, images: jax.Array) -> None:
        # 15 positions of the 11x11/4 windows leave 7, 3 and 1 after the three 3x3/2 pools.
        smallest = 11 + 14 * 4 - 2 * self.stem_padding
        if images.ndim != 4 or min(images.shape[1:3]) < smallest:
            raise UserError(
                f"images must be [N, H, W, C] with H and W at least {smallest}, for three "
                f"max-pools; their shape is {images.shape}."
            )


def alexnet(**arguments: Any) -> AlexNet:
    """The network of 2012, for images of 227 pixels.

    Args:
      **arguments: of `AlexNet`.

    Raises:
      UserError: if an argument makes no network.
    """
    return _checked(AlexNet(**arguments))


def alexnet_owt(**arguments: Any) -> AlexNet:
    """The one-tower network of arXiv 1404.5997, as in torchvision, for images of 224 pixels.

    Args:
      **arguments: of `AlexNet`.

    Raises:
      UserError: if an argument makes no network.
    """
    torchvision: dict[str, Any] = {
        "widths": (64, 192, 384, 256, 256),
        "groups": 1,
        "stem_padding": 2,
        "lrn": False,
        "bias": 0.0,
        "kernel_init": "torch_uniform",
        "dropped": ("fc6", "fc7"),
    }
    return _checked(AlexNet(**(torchvision | arguments)))


def _checked(model: AlexNet) -> AlexNet:
    """Returns `model`, or raises UserError where an argument makes no network."""
    if len(model.widths) != len(KERNEL_SIZES) or min(model.widths) < 1:
        raise UserError(f"widths {model.widths} must be five numbers of at least 1.")
    checks.positive(model, "num_classes", "fc_units", "groups")
    # The halved convolutions read or give out the channels of all five.
    divisors = [d for d in range(1, min(model.widths) + 1) if not any(w % d for w in model.widths)]
    if model.groups not in divisors:
        raise UserError(
            f"groups {model.groups} does not divide the widths {model.widths}; "
            f"these do: {', '.join(map(str, divisors))}."
        )
    if not 0 <= model.stem_padding <= 5:
        raise UserError(f"stem_padding {model.stem_padding} must be 0 to 5, half the kernel.")
    checks.rates(model, "dropout")
    if not set(model.dropped) <= {"fc6", "fc7", "head"}:
        raise UserError(f"dropped {model.dropped} must be of 'fc6', 'fc7', 'head'.")
    checks.choice("kernel_init", model.kernel_init, INITS)
    return model
