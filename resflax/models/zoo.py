"""The named networks: one table from a public name to a constructor with its arguments."""

import difflib
import fnmatch
import functools
import inspect
import typing
from typing import Any

import flax.linen as nn

from resflax.errors import UserError
from resflax.models import checks, constructors
from resflax.models.alexnet import alexnet, alexnet_owt
from resflax.models.bn_inception import bn_inception
from resflax.models.densenet import DenseNet, cifar_densenet, densenet
from resflax.models.googlenet import googlenet
from resflax.models.inception_resnet import inception_resnet
from resflax.models.inception_v3 import inception_v3
from resflax.models.inception_v4 import inception_v4
from resflax.models.nin import cifar_nin
from resflax.models.resnet import ResNet, cifar_resnet, resnet, wide_resnet
from resflax.models.vgg import VGG, vgg

_HE_BOTTLENECK: dict[str, Any] = {"block": "bottleneck", "stride_in": "1x1"}
_PREACT: dict[str, Any] = {"unit": "full_preact"}
_SENET154: dict[str, Any] = {
    "stem": "deep",
    "stem_pool": "ceil",
    "cardinality": 64,
    "base_width": 4,
    "halve_first": True,
    "projection_kernel": 3,
    "dropout": 0.2,
    "se_reduction": 16,
}

# TensorFlow-slim's and torchvision's GoogLeNet.
_GOOGLENET_BN: dict[str, Any] = {
    "batch_norm": True,
    "kernel_5x5": 3,
    "pool4_window": 2,
    "dropout": 0.2,
}


def _resnets() -> dict[str, functools.partial[ResNet]]:
    """ImageNet's, of arXiv 1512.03385, 1603.05027, 1611.05431 (ResNeXt) and 1709.01507 (SE)."""
    table = {f"plain{d}": functools.partial(resnet, depth=d, shortcut="none") for d in (18, 34)}
    for d in (18, 34, 50, 101, 152, 200):
        table[f"resnet{d}"] = functools.partial(resnet, depth=d)
        table[f"preact_resnet{d}"] = functools.partial(resnet, depth=d, **_PREACT)
    for d in (18, 34, 50, 101, 152):
        table[f"se_resnet{d}"] = functools.partial(resnet, depth=d, se_reduction=16)
    for d, cardinality, width in (
        (50, 32, 4),
        (101, 32, 4),
        (101, 64, 4),
        (101, 32, 8),
        (152, 32, 4),
        (152, 64, 4),
        (152, 32, 8),
    ):
        paths = {"cardinality": cardinality, "base_width": width}
        name = f"resnext{d}_{cardinality}x{width}d"
        table[name] = functools.partial(resnet, depth=d, **paths)
        table[f"se_{name}"] = functools.partial(resnet, depth=d, **paths, se_reduction=16)
    for d in (50, 101):
        table[f"wide_resnet{d}_2"] = functools.partial(resnet, depth=d, base_width=128)
    table["senet154"] = functools.partial(resnet, depth=152, **_SENET154)
    return table


def _cifar_resnets() -> dict[str, functools.partial[ResNet]]:
    """CIFAR's, of the same papers: option A in basic nets, B in bottlenecks, as published."""
    table = {}
    for d in (20, 32, 44, 56, 110, 1202):
        table[f"cifar_resnet{d}"] = functools.partial(cifar_resnet, depth=d, shortcut="A")
        table[f"cifar_plain{d}"] = functools.partial(cifar_resnet, depth=d, shortcut="none")
    for d in (164, 1001):
        table[f"cifar_resnet{d}"] = functools.partial(cifar_resnet, depth=d, **_HE_BOTTLENECK)
        table[f"cifar_preact_resnet{d}"] = functools.partial(
            cifar_resnet, depth=d, **_HE_BOTTLENECK, **_PREACT
        )
    table["cifar_preact_resnet110"] = functools.partial(
        cifar_resnet, depth=110, shortcut="A", **_PREACT
    )
    table["cifar_se_resnet110"] = functools.partial(
        cifar_resnet, depth=110, shortcut="A", se_reduction=16
    )
    for d in (110, 164):
        table[f"cifar_se_preact_resnet{d}"] = functools.partial(
            table[f"cifar_preact_resnet{d}"], se_reduction=16
        )
    for cardinality in (8, 16):
        table[f"cifar_resnext29_{cardinality}x64d"] = functools.partial(
            cifar_resnet, depth=29, block="bottleneck", num_filters=64, cardinality=cardinality
        )
    for depth, width in ((28, 10), (40, 4)):
        table[f"wrn{depth}_{width}"] = functools.partial(wide_resnet, depth=depth, width=width)
    return table


def _densenets() -> dict[str, functools.partial[DenseNet]]:
    """Those of arXiv 1608.06993, on ImageNet and, with and without bottlenecks (BC), on CIFAR."""
    table = {f"densenet{d}": functools.partial(densenet, depth=d) for d in (121, 169, 201, 264)}
    table["densenet161"] = functools.partial(densenet, depth=161, growth_rate=48)
    for d, k in ((40, 12), (100, 12), (100, 24)):
        table[f"cifar_densenet{d}_k{k}"] = functools.partial(cifar_densenet, depth=d, growth_rate=k)
    for d, k in ((100, 12), (250, 24), (190, 40), (40, 36), (40, 48), (40, 60)):
        table[f"cifar_densenet_bc{d}_k{k}"] = functools.partial(
            cifar_densenet, depth=d, growth_rate=k, bottleneck=True
        )
    return table


def _inceptions() -> dict[str, functools.partial[Any]]:
    """ImageNet's, of arXiv 1409.4842, 1502.03167, 1512.00567, 1602.07261 and 1709.01507 (SE)."""
    table: dict[str, functools.partial[Any]] = {
        "googlenet": functools.partial(googlenet),
        "bn_inception": functools.partial(bn_inception),
        "inception_v3": functools.partial(inception_v3),
        "inception_v4": functools.partial(inception_v4),
        "inception_resnet_v2": functools.partial(inception_resnet, variant="v2"),
    }
    table |= {f"se_{n}": functools.partial(v, se_reduction=16) for n, v in table.items()}
    table["googlenet_bn"] = functools.partial(googlenet, **_GOOGLENET_BN)
    table["inception_resnet_v1"] = functools.partial(inception_resnet, variant="v1")
    table["inception_resnet_v2_paper"] = functools.partial(inception_resnet, variant="v2_paper")
    return table


def _vggs() -> dict[str, functools.partial[VGG]]:
    """Those of arXiv 1409.1556; with batch norm, as in torchvision; gated (SE, 1709.01507)."""
    table = {}
    for d in (11, 13, 16, 19):
        table[f"vgg{d}"] = functools.partial(vgg, depth=d)
        table[f"vgg{d}_bn"] = functools.partial(vgg, depth=d, norm="batch")
    table["se_vgg16_bn"] = functools.partial(vgg, depth=16, norm="batch", se_reduction=16)
    return table


def _alexnets() -> dict[str, functools.partial[Any]]:
    """AlexNet (2012), that of arXiv 1404.5997, and Network In Network (1312.4400)."""
    return {
        "alexnet": functools.partial(alexnet),
        "alexnet_owt": functools.partial(alexnet_owt),
        "cifar_nin": functools.partial(cifar_nin),
    }


VARIANTS: dict[str, functools.partial[Any]] = (
    _resnets() | _cifar_resnets() | _densenets() | _inceptions() | _vggs() | _alexnets()
)


def list_models(pattern: str = "*") -> list[str]:
    """The public names that match a shell pattern, such as '*resnext*', sorted."""
    return sorted(fnmatch.filter(VARIANTS, pattern))


def create_model(name: str, num_classes: int | None = None, **overrides: Any) -> nn.Module:
    """Builds a named network, changed where overridden.

    Args:
      name: one of `list_models()`.
      num_classes: units of the classifier; None: the data set's that the network was published on.
      **overrides: arguments of the network's family: `depth`, `shortcut`, `cardinality`,
        `base_width`, `se_reduction`, `unit`, `dtype` and the others in the docstring of the family;
        `python -m resflax.models NAME --arguments` lists them. Of a ResNet, `gate`, `shortcut`,
        `skip`, `norm`, `act`, `stem`, `downsample` and `kernel_init` are a name of a table or a
        constructor of anybody's own: see models.constructors.

    Returns:
      A flax.linen module: `model.init(rng, images, train=False)`,
      `model.apply(variables, images, train=False)`.

    Raises:
      UserError: for an unknown name, an unknown override, or values that make no network.
    """
    known = override_names(name)
    unknown = [key for key in overrides if key not in known]
    if unknown:
        raise UserError(
            f"{name} has no argument {', '.join(map(repr, unknown))}; it has {', '.join(known)}."
        )
    hints = argument_types(name)
    for key, value in overrides.items():
        checks.typed(key, value, hints.get(key))
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    # Modules are hashed and compared, so what comes as a list (from JSON, say) becomes a tuple.
    overrides = {
        k: tuple(v) if isinstance(v, list) else constructors.comparable(v)
        for k, v in overrides.items()
    }
    return VARIANTS[name](**overrides)


# Sides of the images that a network was published on, where they are not 224 pixels.
_IMAGE_SIZES = {
    "alexnet": 227,
    "inception_v3": 299,
    "inception_v4": 299,
    "inception_resnet_v1": 299,
    "inception_resnet_v2": 299,
    "inception_resnet_v2_paper": 299,
}


def image_size(name: str) -> int:
    """The side of the images that a named network was published on, pixels."""
    if name.startswith(("cifar_", "wrn")):
        return 32
    return _IMAGE_SIZES.get(name.removeprefix("se_"), 224)


def argument_types(name: str) -> dict[str, Any]:
    """The arguments that `create_model(name, ...)` takes, and their annotations.

    Raises:
      UserError: if there is no such network.
    """
    known = override_names(name)
    own = typing.get_type_hints(VARIANTS[name].func)
    hints = typing.get_type_hints(own["return"]) | own
    return {argument: hints.get(argument) for argument in known}


def override_names(name: str) -> list[str]:
    """The overrides that `create_model(name, ...)` takes.

    Raises:
      UserError: if there is no such network.
    """
    if name not in VARIANTS:
        close = difflib.get_close_matches(name, VARIANTS, n=5, cutoff=0.5)
        hint = f"the closest are {', '.join(close)}" if close else "see resflax.list_models()"
        raise UserError(f"There is no network {name!r}; {hint}.")
    signature = inspect.signature(VARIANTS[name].func)
    own = [p for p in signature.parameters if p != "arguments"]
    # The depth decides the stage sizes and, of four stages, the block.
    decided = {"stage_sizes", "block", "num_classes", "parent", "name", *own}
    family = inspect.signature(signature.return_annotation).parameters
    return own + [field for field in family if field not in decided]
