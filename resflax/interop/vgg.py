"""Layouts of VGG: torchvision's, with dense layers, and timm's, with convolutions instead."""

import re

from resflax.interop.layout import Family, Layout
from resflax.interop.weights import POINTWISE, as_convolution, flattened
from resflax.models.vgg import MAP_SIZE, VGG

_TORCHVISION_HEAD = {"fc6": "classifier.0", "fc7": "classifier.3", "head": "classifier.6"}
_TIMM_HEAD = {"fc6": "pre_logits.fc1", "fc7": "pre_logits.fc2", "head": "head.fc"}

_FIXED = {"norm": ("none", "batch"), "se_reduction": 0}
_FREE = frozenset({"fc_units", "num_filters", "se_bias"})


def _feature(model: VGG, path: str) -> str | None:
    """A layer's number in the sequence of convolutions, norms, activations and pools."""
    match = re.fullmatch(r"stage(\d+)/(conv|norm)(\d+)", path)
    if match is None:
        return None
    stage, kind, number = int(match[1]), match[2], int(match[3])
    layers = 2 if model.norm == "none" else 3
    before = sum(layers * size + 1 for size in model.stage_sizes[: stage - 1])
    return f"features.{before + layers * (number - 1) + (kind == 'norm')}"


def _torchvision(model: VGG, path: str) -> str | None:
    return _TORCHVISION_HEAD.get(path) or _feature(model, path)


def _timm(model: VGG, path: str) -> str | None:
    return _TIMM_HEAD.get(path) or _feature(model, path)


FAMILY = Family(
    (
        Layout(
            "torchvision",
            "classifier.0.weight",
            _torchvision,
            lambda model, shapes: {"dense_evaluation": False, "bn_epsilon": 1e-5},
            _FIXED,
            _FREE,
            {"fc6": flattened(MAP_SIZE, MAP_SIZE)},
        ),
        Layout(
            "timm",
            "pre_logits.fc1.weight",
            _timm,
            lambda model, shapes: {"dense_evaluation": True, "bn_epsilon": 1e-5},
            _FIXED,
            _FREE,
            {"fc6": as_convolution(MAP_SIZE, MAP_SIZE), "fc7": POINTWISE},
        ),
    ),
    stems=("stage1/conv1",),
)
