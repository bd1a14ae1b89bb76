"""Layouts of ResNets: torchvision's and timm's, timm's older SE-ResNets, and its ResNets v2."""

import re
from typing import Any

from resflax.interop.layout import Family, Layout, Shapes
from resflax.interop.weights import POINTWISE
from resflax.models.gates import gate_units
from resflax.models.resnet import ResNet

_BLOCK = re.compile(r"stage(\d+)_block(\d+)/(.+)")

_STEM = {
    "stem/conv": "conv1",
    "stem/norm": "bn1",
    "stem/conv1": "conv1.0",
    "stem/norm1": "conv1.1",
    "stem/conv2": "conv1.3",
    "stem/norm2": "conv1.4",
    "stem/conv3": "conv1.6",
    "stem/norm3": "bn1",
    "head": "fc",
}

_LEGACY_STEM = {
    "stem/conv": "layer0.conv1",
    "stem/norm": "layer0.bn1",
    **{f"stem/conv{i}": f"layer0.conv{i}" for i in (1, 2, 3)},
    **{f"stem/norm{i}": f"layer0.bn{i}" for i in (1, 2, 3)},
    "head": "last_linear",
}

_V2_STEM = {"stem/conv": "stem.conv", "norm": "norm", "head": "head.fc"}


def _layers(gate: str) -> dict[str, str]:
    """The layers of a block."""
    return {
        **{f"conv{i}": f"conv{i}" for i in (1, 2, 3)},
        **{f"norm{i}": f"bn{i}" for i in (1, 2, 3)},
        "shortcut/conv": "downsample.0",
        "shortcut/norm": "downsample.1",
        "se/squeeze": f"{gate}.fc1",
        "se/excite": f"{gate}.fc2",
    }


_LAYERS = _layers("se")
_LEGACY_LAYERS = _layers("se_module")
_V2_LAYERS = {
    **{f"{layer}{i}": f"{layer}{i}" for layer in ("conv", "norm") for i in (1, 2, 3)},
    "shortcut/conv": "downsample.conv",
}


def _place(stem: dict[str, str], block: str, layers: dict[str, str], path: str) -> str | None:
    match = _BLOCK.fullmatch(path)
    if match is None:
        return stem.get(path)
    if match[3] not in layers:
        return None
    prefix = block.format(stage=int(match[1]) - 2, layer=int(match[1]) - 1, block=int(match[2]) - 1)
    return f"{prefix}.{layers[match[3]]}"


def _current(model: ResNet, path: str) -> str | None:
    return _place(_STEM, "layer{layer}.{block}", _LAYERS, path)


def _legacy(model: ResNet, path: str) -> str | None:
    return _place(_LEGACY_STEM, "layer{layer}.{block}", _LEGACY_LAYERS, path)


def _v2(model: ResNet, path: str) -> str | None:
    return _place(_V2_STEM, "stages.{stage}.blocks.{block}", _V2_LAYERS, path)


def _conventions(model: ResNet, shapes: Shapes) -> dict[str, Any]:
    """Of torchvision and timm.

    What shows in the arrays: norms without running statistics are group norms; the units of the
    gates are rounded to a multiple of 8 where they are not C // reduction.
    """
    statistics = any(key.endswith("running_mean") for key in shapes)
    chosen = {
        "stem_pool": "symmetric",
        "stride_in": "3x3",
        "bn_epsilon": 1e-5,
        "norm": "batch" if statistics else "group",
    }
    gate = shapes.get("layer1.0.se.fc1.weight")
    if gate is not None and model.se_reduction:
        exact = gate[0] == gate_units(gate[1], model.se_reduction, 1)
        chosen["se_divisor"] = 1 if exact else 8
    return chosen


def _legacy_conventions(model: ResNet, shapes: Shapes) -> dict[str, Any]:
    """Of timm's senet.py, which follows the released Caffe networks.

    Nothing shows in the arrays. Plain bottlenecks have the stride in the first convolution, grouped
    ones in the second. Basic blocks, of no Caffe network, have one activation more.
    """
    basic = model.block == "basic"
    return {
        "stem_pool": "ceil",
        "stride_in": "1x1" if model.cardinality == 1 and not basic else "3x3",
        "unit": "relu_around_addition" if basic else "original",
        "bn_epsilon": 1e-5,
    }


def _v2_conventions(model: ResNet, shapes: Shapes) -> dict[str, Any]:
    """Of timm's resnetv2.py: the pool stands before the first norm and activation."""
    return {
        "stem_pool": "symmetric",
        "stride_in": "3x3",
        "first_act": "block",
        "bn_epsilon": 1e-5,
    }


_FIXED: dict[str, Any] = {
    "stem": ("imagenet", "deep", "cifar"),
    "shortcut": "B",
    "downsample": "first",
    "skip": "identity",
    "drop_path": 0.0,
    "gate": (None, "se"),
    "se_squeeze": "avg",
    "se_gate": "sigmoid",
    "se_integration": "standard",
    "act": "relu",
    "conv_bias": (None, "none"),
}
# The arrays show these; or they have no effect, as there are neither skips nor pre-activation.
_FREE = frozenset(
    {
        "base_width", "block", "cardinality", "drop_path_mode", "first_act", "gate_bias",
        "num_filters", "residual_scale", "skip_scale", "stem_filters",
    }
)  # fmt: skip
_LEGACY_FREE = _FREE | {"halve_first", "projection_kernel", "se_reduction"}
_TIMM_FREE = _LEGACY_FREE | {"se_divisor"}
_ORIGINAL = {**_FIXED, "unit": "original"}

# The dense layers of the gates are 1x1 convolutions in timm.
_GATES = {"se/squeeze": POINTWISE, "se/excite": POINTWISE}

# torchvision and timm have the same names, so that reading takes the first for both.
FAMILY = Family(
    (
        Layout(
            "torchvision",
            "bn1.weight",
            _current,
            _conventions,
            {**_ORIGINAL, "stem": "imagenet", "norm": "batch", "se_reduction": 0},
            _FREE,
            _GATES,
        ),
        Layout("timm", "bn1.weight", _current, _conventions, _ORIGINAL, _TIMM_FREE, _GATES),
        Layout(
            "timm_legacy",
            "layer0.conv1.weight",
            _legacy,
            _legacy_conventions,
            _FIXED,
            _LEGACY_FREE,
            _GATES,
        ),
        Layout(
            "timm_v2",
            "stages.0.blocks.0.norm1.weight",
            _v2,
            _v2_conventions,
            {**_FIXED, "stem": ("imagenet", "cifar"), "unit": "full_preact", "se_reduction": 0},
            _FREE,
            {"head": POINTWISE},
        ),
    ),
    stems=("stem/conv", "stem/conv1"),
)
