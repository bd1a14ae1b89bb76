"""The named networks: one table from a public name to a constructor with its arguments."""

import difflib
import fnmatch
import functools
import inspect
from typing import Any

import flax.linen as nn

from resflax.models.resnet import ResNet, cifar_resnet, resnet, wide_resnet

_HE_BOTTLENECK: dict[str, Any] = {"block": "bottleneck", "stride_in": "1x1"}
_PREACT: dict[str, Any] = {"unit": "full_preact"}
_SENET154: dict[str, Any] = {
    "stem": "deep",
    "cardinality": 64,
    "base_width": 4,
    "halve_first": True,
    "projection_kernel": 3,
    "dropout": 0.2,
    "se_reduction": 16,
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
    for cardinality in (8, 16):
        table[f"cifar_resnext29_{cardinality}x64d"] = functools.partial(
            cifar_resnet, depth=29, block="bottleneck", num_filters=64, cardinality=cardinality
        )
    for depth, width in ((28, 10), (40, 4)):
        table[f"wrn{depth}_{width}"] = functools.partial(wide_resnet, depth=depth, width=width)
    return table


VARIANTS: dict[str, functools.partial[ResNet]] = _resnets() | _cifar_resnets()


def list_models(pattern: str = "*") -> list[str]:
    """The public names that match a shell pattern, such as '*resnext*', sorted."""
    return sorted(fnmatch.filter(VARIANTS, pattern))


def create_model(name: str, num_classes: int | None = None, **overrides: Any) -> nn.Module:
    """Builds a named network, changed where overridden.

    Args:
      name: one of `list_models()`.
      num_classes: units of the classifier; None: the data set's that the network was published on.
      **overrides: arguments of the network's family: `depth`, `shortcut`, `cardinality`,
        `base_width`, `se_reduction`, `unit`, `dtype` and the others in the docstring of the family.

    Returns:
      A flax.linen module: `model.init(rng, images, train=False)`,
      `model.apply(variables, images, train=False)`.

    Raises:
      ValueError: for an unknown name, an unknown override, or values that make no network.
    """
    if name not in VARIANTS:
        close = difflib.get_close_matches(name, VARIANTS, n=5, cutoff=0.5)
        hint = f"the closest are {', '.join(close)}" if close else "see resflax.list_models()"
        raise ValueError(f"There is no network {name!r}; {hint}.")
    variant = VARIANTS[name]
    known = override_names(name)
    unknown = [key for key in overrides if key not in known]
    if unknown:
        raise ValueError(
            f"{name} has no argument {', '.join(map(repr, unknown))}; it has {', '.join(known)}."
        )
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    # Modules are hashed and compared, so what comes as a list (from JSON, say) becomes a tuple.
    overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
    return variant(**overrides)


def override_names(name: str) -> list[str]:
    """The overrides that `create_model(name, ...)` takes."""
    own = [p for p in inspect.signature(VARIANTS[name].func).parameters if p != "arguments"]
    # The depth decides the stage sizes and, of four stages, the block.
    decided = {"stage_sizes", "block", "num_classes", "parent", "name", *own}
    return own + [field for field in inspect.signature(ResNet).parameters if field not in decided]
