"""Layouts of the Inception networks: torchvision's and timm's.

A module's branches are named by formats, in their order: `{index}` is a convolution's number in
its branch counted from 0, `{number}` the same counted from 1, with the letter of a fork's part.
"""

import re
from collections.abc import Mapping
from typing import Any

from resflax.interop.layout import Family, Layout, Shapes
from resflax.interop.weights import flattened
from resflax.models.googlenet import GoogLeNet
from resflax.models.inception_resnet import InceptionResNet
from resflax.models.inception_v3 import InceptionV3
from resflax.models.inception_v4 import InceptionV4

Branches = tuple[str, ...]

# The library's module for a part of our network, and the branches in it.
Part = tuple[str, Branches]

_LAYERS = {"conv": "conv", "norm": "bn"}


def _in_part(parts: Mapping[str, Part], path: str) -> str | None:
    """Of a layer of a branch of a module: 'mixed_6a/branch2_conv1/norm'."""
    match = re.fullmatch(r"(\w+)/branch(\d+)_conv(\d+)([a-z]?)/(conv|norm)", path)
    if match is None or match[1] not in parts:
        return None
    module, branches = parts[match[1]]
    number, letter = int(match[3]), match[4]
    branch = branches[int(match[2]) - 1].format(
        index=f"{number - 1}{letter}", number=f"{number}{letter}"
    )
    return f"{module}.{branch}.{_LAYERS[match[5]]}"


def _in_chain(chains: Mapping[str, str], path: str) -> str | None:
    """Of a layer of a chain, 'stem/conv1/norm', or a module that is none: 'head'."""
    module, _, layer = path.rpartition("/")
    if module in chains and layer in _LAYERS:
        return f"{chains[module]}.{_LAYERS[layer]}"
    return chains.get(path)


def _google_net(model: GoogLeNet, path: str) -> str | None:
    branches = ("branch1", "branch2.{index}", "branch3.{index}", "branch4.1")
    parts = {name: (name.replace("_", ""), branches) for name in model.parts()}
    return _in_part(parts, path) or _in_chain(_GOOGLENET_CHAINS, path)


_GOOGLENET_CHAINS = {
    **{f"stem/conv{i}": f"conv{i}" for i in (1, 2, 3)},
    **{
        f"{part}_aux/{ours}": f"{aux}.{theirs}"
        for part, aux in (("inception_4a", "aux1"), ("inception_4d", "aux2"))
        for ours, theirs in (("conv1", "conv"), ("hidden", "fc1"), ("head", "fc2"))
    },
    "head": "fc",
}


def _google_net_conventions(model: GoogLeNet, shapes: Shapes) -> dict[str, Any]:
    chosen = {
        "batch_norm": True,
        "kernel_5x5": 3,
        "pool4_window": 2,
        "bn_epsilon": 1e-3,
        "aux_heads": "aux1.fc1.weight" in shapes,
    }
    return {**chosen, "aux_size": 4} if chosen["aux_heads"] else chosen


_V3_A: Branches = ("branch1x1", "branch5x5_{number}", "branch3x3dbl_{number}", "branch_pool")
_V3_C: Branches = ("branch1x1", "branch7x7_{number}", "branch7x7dbl_{number}", "branch_pool")
_V3_E: Branches = ("branch1x1", "branch3x3_{number}", "branch3x3dbl_{number}", "branch_pool")
_V3_BRANCHES: dict[str, Branches] = {
    **{f"mixed_5{letter}": _V3_A for letter in "bcd"},
    "mixed_6a": ("branch3x3", "branch3x3dbl_{number}"),
    **{f"mixed_6{letter}": _V3_C for letter in "bcde"},
    "mixed_7a": ("branch3x3_{number}", "branch7x7x3_{number}"),
    **{f"mixed_7{letter}": _V3_E for letter in "bc"},
}
_V3_PARTS = {name: (name.capitalize(), branches) for name, branches in _V3_BRANCHES.items()}
_V3_STEM = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
_V3_CHAINS = {
    **{f"stem/conv{i}": f"Conv2d_{name}" for i, name in enumerate(_V3_STEM, start=1)},
    "mixed_6e_aux/conv1": "AuxLogits.conv0",
    "mixed_6e_aux/conv2": "AuxLogits.conv1",
    "mixed_6e_aux/head": "AuxLogits.fc",
    "head": "fc",
}


def _inception_v3(model: InceptionV3, path: str) -> str | None:
    return _in_part(_V3_PARTS, path) or _in_chain(_V3_CHAINS, path)


def _inception_v3_conventions(model: InceptionV3, shapes: Shapes) -> dict[str, Any]:
    return {
        "aux_heads": "AuxLogits.fc.weight" in shapes,
        "count_padding": True,
        "bn_epsilon": 1e-3,
    }


# Branches of the modules of Inception v4, by the beginnings of our parts' names.
_V4_BRANCHES: dict[str, Branches] = {
    "mixed_3a": ("", "conv"),
    "mixed_4a": ("branch0.{index}", "branch1.{index}"),
    "mixed_5a": ("conv",),
    "inception_a": ("branch0", "branch1.{index}", "branch2.{index}", "branch3.1"),
    "reduction_a": ("branch0", "branch1.{index}"),
    "inception_b": ("branch0", "branch1.{index}", "branch2.{index}", "branch3.1"),
    "reduction_b": ("branch0.{index}", "branch1.{index}"),
    "inception_c": ("branch0", "branch1_{index}", "branch2_{index}", "branch3.1"),
}


def _inception_v4(model: InceptionV4, path: str) -> str | None:
    """All parts are numbered in a row; the stem's three convolutions are the first."""
    parts = {
        name: (f"features.{i}", _V4_BRANCHES[name.rstrip("0123456789")])
        for i, name in enumerate(model.parts(), start=2)
        if name != "stem"
    }
    chains = {f"stem/conv{i + 1}": f"features.{i}" for i in range(3)} | {"head": "last_linear"}
    return _in_part(parts, path) or _in_chain(chains, path)


_RESIDUAL: Branches = ("branch0", "branch1.{index}", "branch2.{index}")
_RESNET_V2_STEM = ("1a", "2a", "2b", "3b", "4a")


def _inception_resnet_v2(model: InceptionResNet, path: str) -> str | None:
    a, b, c = model.stage_sizes
    blocks = {
        **{f"block_a{i + 1}": f"repeat.{i}" for i in range(a)},
        **{f"block_b{i + 1}": f"repeat_1.{i}" for i in range(b)},
        **{f"block_c{i + 1}": f"repeat_2.{i}" for i in range(c - 1)},
        f"block_c{c}": "block8",
    }
    parts: dict[str, Part] = {
        "mixed_5b": ("mixed_5b", (*_RESIDUAL, "branch3.1")),
        "reduction_a": ("mixed_6a", _RESIDUAL),
        "reduction_b": ("mixed_7a", ("branch0.{index}", "branch1.{index}", "branch2.{index}")),
        **{ours: (theirs, _RESIDUAL) for ours, theirs in blocks.items()},
    }
    chains = {
        **{f"stem/conv{i}": f"conv2d_{name}" for i, name in enumerate(_RESNET_V2_STEM, start=1)},
        **{f"{ours}/up": f"{theirs}.conv2d" for ours, theirs in blocks.items()},
        "conv_7b/conv1": "conv2d_7b",
        "head": "classif",
    }
    return _in_part(parts, path) or _in_chain(chains, path)


def _family(*layouts: Layout, image_size: int = 299) -> Family:
    return Family(layouts, stems=("stem/conv1/conv",), image_size=image_size)


_FIXED = {"se_reduction": 0, "norm_scale": True}

GOOGLENET = _family(
    Layout(
        "torchvision",
        "inception3a.branch1.conv.weight",
        _google_net,
        _google_net_conventions,
        _FIXED,
        frozenset({"aux_size"}),  # of the auxiliary classifiers, where there are any
        {"hidden": flattened(4, 4)},
    ),
    image_size=224,
)

INCEPTION_V3 = _family(
    *(
        Layout(
            library,
            "Mixed_5b.branch1x1.conv.weight",
            _inception_v3,
            _inception_v3_conventions,
            _FIXED,
        )
        for library in ("torchvision", "timm")
    )
)

INCEPTION_V4 = _family(
    Layout(
        "timm",
        "features.3.conv.conv.weight",
        _inception_v4,
        lambda model, shapes: {"bn_epsilon": 1e-3},
        _FIXED,
    )
)

INCEPTION_RESNET_V2 = _family(
    Layout(
        "timm",
        "mixed_5b.branch0.conv.weight",
        _inception_resnet_v2,
        lambda model, shapes: {"bn_epsilon": 1e-3, "scales": (0.17, 0.1, 0.2)},
        {**_FIXED, "variant": "v2"},
    )
)
