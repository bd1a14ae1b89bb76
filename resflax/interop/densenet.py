"""Layout of DenseNets: torchvision's, which is timm's too."""

import re

from resflax.interop.layout import Family, Layout
from resflax.models.densenet import DenseNet

_OTHERS = {
    "stem/conv": "features.conv0",
    "stem/norm": "features.norm0",
    "norm": "features.norm5",
    "head": "classifier",
}


def _place(model: DenseNet, path: str) -> str | None:
    if match := re.fullmatch(r"block(\d+)_layer(\d+)/(conv|norm)([12])", path):
        block, layer, kind, number = match.groups()
        return f"features.denseblock{block}.denselayer{layer}.{kind}{number}"
    if match := re.fullmatch(r"transition(\d+)/(conv|norm)", path):
        return f"features.transition{match[1]}.{match[2]}"
    return _OTHERS.get(path)


def _layout(library: str) -> Layout:
    return Layout(
        library,
        "features.conv0.weight",
        _place,
        lambda model, shapes: {"bn_epsilon": 1e-5},
        {"stem": "imagenet", "norm": "batch", "bottleneck": True},
        frozenset({"growth_rate", "stem_filters"}),
        # torchvision's published files are older than its names.
        renamed=(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),
    )


FAMILY = Family((_layout("torchvision"), _layout("timm")), stems=("stem/conv",))
