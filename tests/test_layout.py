"""Which networks the layouts of other libraries are of: a field that none knows is refused."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import pytest

from resflax import UserError, create_model
from resflax.interop import keras, resnet, torch
from resflax.interop.layout import NEUTRAL, RATES
from resflax.models.resnet import ResNet


class Part(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x


# Of each field of a ResNet that is told a value that is not its default: whether a network of
# torchvision's or timm's may have it. A new field belongs into one of the two.
KNOWN = {
    "any_size": True, "axis_name": "devices", "base_width": 4, "block": "basic",
    "bn_momentum": 0.5, "cardinality": 2, "drop_path_mode": "sample", "dropout": 0.5,
    "dtype": jnp.bfloat16, "first_act": "block", "form": "a", "gate": "se", "gate_bias": 1.0,
    "halve_first": True, "kernel_init": "lecun", "num_classes": 5, "num_filters": 8,
    "packed": True, "projection_kernel": 3, "remat": True, "residual_scale": 0.5, "scan": 0,
    "se_divisor": 8, "se_reduction": 16, "skip_scale": 0.5, "stage_sizes": (1,), "stem": "deep",
    "stem_filters": 8, "zero_init_last": True,
    # Conventions, which are compared with the arrays at hand.
    "bn_epsilon": 1e-3, "norm": "group", "stem_pool": "ceil", "stride_in": "1x1",
}  # fmt: skip
REFUSED = {
    "act": "silu", "conv_bias": "all", "downsample": "last", "drop_path": 0.5, "gate": Part,
    "norm": nn.LayerNorm, "se_bias": False, "se_gate": "tanh", "se_integration": "pre",
    "se_squeeze": "max", "se_stages": (2,), "shortcut": "A", "skip": "dropout", "stem": Part,
    "unit": "full_preact",
}  # fmt: skip
TIMM = resnet.FAMILY.layouts[1]


def test_each_field_of_a_resnet_is_either_known_or_refused():
    fields = {field.name for field in dataclasses.fields(ResNet)} - {"name", "parent"}
    assert fields == KNOWN.keys() | REFUSED.keys()
    model = ResNet((1, 1))
    for field, value in KNOWN.items():
        assert TIMM.unknown(model.clone(**{field: value})) == [], field
    for field, value in REFUSED.items():
        (said,) = TIMM.unknown(model.clone(**{field: value}))
        assert said.startswith(f"{field} ")


class Extended(ResNet):
    """With a field that no layout knows."""

    extra: int = 0


@pytest.mark.parametrize("layout", resnet.FAMILY.layouts, ids=lambda layout: layout.library)
def test_a_field_that_nobody_knows_must_have_its_default(layout):
    unit = {"unit": "full_preact"} if layout.library == "timm_v2" else {}
    assert layout.unknown(Extended((1,), **unit)) == []
    assert layout.unknown(Extended((1,), extra=1, **unit)) == ["extra 1 is 0 there"]


def test_a_part_from_outside_is_named():
    said = {
        layout.library: layout.unknown(ResNet((1,), gate=Part))
        for layout in torch.FAMILIES[ResNet].layouts
    }
    assert said["torchvision"] == ["gate Part is None or 'se' there"]


@pytest.mark.parametrize("family", torch.FAMILIES, ids=lambda family: family.__name__)
def test_layouts_name_fields_that_there_are(family):
    fields = {field.name for field in dataclasses.fields(family)}
    for layout in torch.FAMILIES[family].layouts:
        assert layout.fixed.keys() | layout.free <= fields
    every = {field.name for known in torch.FAMILIES for field in dataclasses.fields(known)}
    assert every >= NEUTRAL | RATES


@pytest.mark.parametrize("name", keras.LAYOUTS)
def test_keras_has_its_own_networks_and_no_others(name):
    layout = keras.LAYOUTS[name]
    keras._check_known(name, create_model(name, **layout.overrides), layout)
    changed = {"resnet": {"gate": Part}, "densenet": {"norm": Part}}
    family = "resnet" if "inception" not in name and "resnet" in name else name.rstrip("0123456789")
    model = create_model(name, **layout.overrides, **changed.get(family, {"se_reduction": 4}))
    with pytest.raises(UserError, match=rf"Keras has no {name} with these arguments: "):
        keras._check_known(name, model, layout)


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"stem_pool": "symmetric"}, None), ({"downsample": Part}, "downsample Part is 'last' there")],
)
def test_a_convention_of_keras_can_be_overridden_by_a_name(changed, said):
    layout = keras.LAYOUTS["preact_resnet50"]
    model = create_model("preact_resnet50", **(layout.overrides | changed))
    if said is None:
        keras._check_known("preact_resnet50", model, layout)
    else:
        with pytest.raises(UserError, match=said):
            keras._check_known("preact_resnet50", model, layout)
