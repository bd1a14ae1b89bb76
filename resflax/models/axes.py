"""The axes of a ResNet: what each can be, and what does not fit together."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from resflax.errors import UserError
from resflax.models import checks, constructors, gates, layers, residual
from resflax.models.shortcuts import SHORTCUTS
from resflax.models.skips import SKIPS
from resflax.models.stem import POOLS, STEMS

if TYPE_CHECKING:
    from resflax.models.resnet import ResNet

# The kind of block and the number of blocks a stage, by depth (He 2015, 1512.03385, Table 1; 200:
# 1603.05027, Table 5). 10, 14 and 26 continue the table downwards, for small images.
IMAGENET_DEPTHS: dict[int, tuple[str, tuple[int, ...]]] = {
    10: ("basic", (1, 1, 1, 1)),
    14: ("bottleneck", (1, 1, 1, 1)),
    18: ("basic", (2, 2, 2, 2)),
    26: ("bottleneck", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
    200: ("bottleneck", (3, 24, 36, 3)),
}

# Of the axes that can be a name or a constructor, the names.
TABLES: dict[str, Mapping[str, Any]] = {
    "stem": STEMS,
    "downsample": residual.DOWNSAMPLES,
    "shortcut": SHORTCUTS,
    "skip": SKIPS,
    "gate": gates.GATES,
    "act": layers.ACTIVATIONS,
    "norm": layers.NORMS,
    "kernel_init": layers.INITS,
}

CHOICES: dict[str, Collection[str]] = {
    "block": ("basic", "bottleneck"),
    "stem_pool": POOLS,
    "stride_in": ("1x1", "3x3"),
    "form": ("a", "b", "c"),
    "unit": residual.UNITS,
    "first_act": ("stem", "block"),
    "drop_path_mode": ("batch", "sample"),
    "se_squeeze": gates.SQUEEZES,
    "se_gate": gates.SIGMOIDS,
    "se_integration": ("standard", "pre", "post", "identity", "3x3"),
    "conv_bias": ("none", "all", "unnormed"),
}


def check(model: "ResNet") -> "ResNet":
    """Returns the network, or raises UserError where its arguments do not fit together."""
    for name, table in TABLES.items():
        # Without a choice, the reduction decides about gates.
        if name != "gate" or model.gate is not None:
            constructors.check(name, getattr(model, name), table)
    for name, choices in CHOICES.items():
        # Without a choice, the norm decides about biases.
        if name != "conv_bias" or model.conv_bias is not None:
            checks.choice(name, getattr(model, name), choices)
    checks.positive(
        model,
        "num_classes",
        "num_filters",
        "cardinality",
        "base_width",
        "projection_kernel",
        "se_divisor",
    )
    checks.rates(model, "dropout", "drop_path")
    if model.scan < 0:
        raise UserError(f"scan {model.scan} must be 0 (no loops) or a number of equal blocks.")
    _check_identity_path(model)
    _check_block(model)
    _check_gates(model)
    return model


def _check_identity_path(model: "ResNet") -> None:
    if model.shortcut == "none" and (model.skip != "identity" or model.drop_path):
        raise UserError(
            f"skip {constructors.title(model.skip)} and drop_path {model.drop_path} need a "
            "shortcut: 'A', 'B' or 'C'."
        )
    if model.zero_init_last and residual.UNITS[model.unit].last[-1:] == ("act",):
        raise UserError(
            f"zero_init_last: a branch that ends in a ReLU, as in unit {model.unit!r}, never "
            "leaves zero; the other units do."
        )
    norm = constructors.chosen(model.norm, layers.NORMS)
    if model.zero_init_last and "scale_init" not in constructors.declared(norm):
        raise UserError(
            "zero_init_last needs a norm with a scale: norm 'batch' or 'group', or a constructor "
            "with the field `scale_init`."
        )


def _check_block(model: "ResNet") -> None:
    if model.block == "basic" and (model.cardinality > 1 or model.base_width != 64):
        depths = (d for d, (block, _) in IMAGENET_DEPTHS.items() if block == "bottleneck")
        raise UserError(
            f"cardinality {model.cardinality} and base_width {model.base_width} need bottleneck "
            f"blocks; a network of {sum(model.stage_sizes)} basic blocks has none. Depths with "
            f"bottlenecks: {checks.listed(depths)}; of three stages: block 'bottleneck' and 9n + 2."
        )
    # Wider blocks are multiples of the first stage's, so it decides. An uneven split of the
    # block's channels over the paths is nowhere published and nowhere fast.
    width = 4 * model.num_filters
    if width % model.cardinality:
        divisors = (d for d in range(1, width + 1) if width % d == 0)
        raise UserError(
            f"cardinality {model.cardinality} does not divide the {width} channels of the first "
            f"stage's blocks (4 x num_filters); these do: {checks.listed(divisors)}."
        )
    model.branch(2, 1)


def _check_gates(model: "ResNet") -> None:
    stages = range(2, 2 + len(model.stage_sizes))
    chosen = tuple(model.se_stages or stages)
    if not set(chosen) <= set(stages):
        raise UserError(
            f"se_stages {chosen}: the stages are {checks.listed(stages)} (the stem is 1)."
        )
    if model.se_reduction < 0:
        raise UserError(f"se_reduction {model.se_reduction} must be 0 (no gates) or more.")
    if model.gate == "se" and not model.se_reduction:
        raise UserError("gate 'se' needs se_reduction, such as 16.")
    if model.gate not in (None, "se") and model.se_reduction:
        raise UserError(
            f"se_reduction {model.se_reduction} is of the gate 'se'; with gate "
            f"{constructors.title(model.gate)} it must be 0."
        )
    place = model.se_integration
    if place == "3x3" and model.block == "basic":
        raise UserError("se_integration '3x3' needs bottleneck blocks; these are basic ones.")
    gated = model.gate or model.se_reduction
    if place == "identity" and gated and model.shortcut == "none":
        raise UserError("se_integration 'identity' needs a shortcut; a plain net has none.")
    stage = min(chosen)
    narrowest = model.branch(stage, 1)[1 if place == "3x3" else -1].filters
    if place == "pre" and stage > 2:  # the gate sees what the stage before gives out
        narrowest = model.branch(stage - 1, 1)[-1].filters
    elif place == "pre" and isinstance(model.stem, str):  # or the stem
        widening = STEMS[model.stem].args[0][-1].widening
        narrowest = widening * (model.stem_filters or model.num_filters)
    if model.se_reduction > narrowest:
        raise UserError(
            f"se_reduction {model.se_reduction} leaves no unit of {narrowest} channels; "
            f"at most {narrowest}."
        )
