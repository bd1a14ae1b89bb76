"""Layout of AlexNet: torchvision's, which is the network of "One weird trick"."""

from typing import Any

from resflax.interop.layout import Family, Layout, Shapes
from resflax.interop.weights import flattened
from resflax.models.alexnet import MAP_SIZE, AlexNet

_PLACES = {
    **{f"conv{i}": f"features.{n}" for i, n in enumerate((0, 3, 6, 8, 10), start=1)},
    "fc6": "classifier.1",
    "fc7": "classifier.4",
    "head": "classifier.6",
}


def _place(model: AlexNet, path: str) -> str | None:
    return _PLACES.get(path)


def _conventions(model: AlexNet, shapes: Shapes) -> dict[str, Any]:
    return {
        "widths": (64, 192, 384, 256, 256),
        "groups": 1,
        "stem_padding": 2,
        "lrn": False,
    }


FAMILY = Family(
    (
        Layout(
            "torchvision",
            "classifier.1.weight",
            _place,
            _conventions,
            free=frozenset({"bias", "fc_units"}),
            kernels={"fc6": flattened(MAP_SIZE, MAP_SIZE)},
        ),
    ),
    stems=("conv1",),
)
