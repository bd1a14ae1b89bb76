"""Tests of the named networks: exact counts, parameter paths, and messages for wrong choices."""

import csv
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import resflax
from resflax import UserError, create_model
from resflax.models.published import published, table

TABLE = pathlib.Path(resflax.__file__).with_name("models") / "published.csv"
ROWS = list(csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines()))
STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
HE = '{"stride_in": "1x1"}'


# Counted by closed forms and from figures in test_densenet.py and test_inception.py.
ELSEWHERE = {
    ("densenet264", "", "1000"),
    ("cifar_densenet100_k24", "", "10"),
    ("cifar_densenet_bc250_k24", "", "10"),
    ("bn_inception", '{"width_4cd": 576}', "1000"),
    ("inception_resnet_v2_paper", "", "1000"),
}


def _key(row):
    return row["model"], row["overrides"], row["num_classes"]


COUNTS = {_key(row): row["params"] for row in ROWS}


def _count(row):
    overrides = json.loads(row["overrides"] or "{}")
    model = create_model(row["model"], int(row["num_classes"]), **overrides)
    return resflax.count(model, (int(row["input_size"]),) * 2 + (3,))


def _kind(row):
    return re.match("[a-z_]+", row["model"])[0], row["overrides"]


# The shallowest network of each kind, with each set of overrides, is quick; the others repeat it at
# other depths. Of each name it is quicker still.
QUICK = [i for i, row in enumerate(ROWS) if _kind(row) not in map(_kind, ROWS[:i])]
QUICKEST = [i for i, row in enumerate(ROWS) if _kind(row)[0] not in (_kind(r)[0] for r in ROWS[:i])]


# Of hundreds of layers even the shallowest, which their own files count some of.
DEEP = ("densenet", "inception", "googlenet")


def _time(i):
    if i in QUICKEST and not any(name in ROWS[i]["model"] for name in DEEP):
        return []
    return pytest.mark.long if i in QUICK else pytest.mark.slow


def each_row(*, counted):
    params = [
        pytest.param(
            row,
            id=re.sub(
                r'[{}" ]', "", "-".join([row["model"], row["num_classes"], row["overrides"]])
            ),
            marks=_time(i),
        )
        for i, row in enumerate(ROWS)
        if bool(row["params"]) == counted and _key(row) not in ELSEWHERE
    ]
    return pytest.mark.parametrize("row", params)


@each_row(counted=True)
def test_counts_are_the_published_ones(row):
    counted = _count(row)
    assert counted.params == int(row["params"])
    # The file has four decimals: half of the last one is 0.12 % of the smallest network.
    if not row["gmacs"]:
        return
    assert counted.macs / 1e9 == pytest.approx(float(row["gmacs"]), rel=1e-3, abs=5e-5)


def _projection(c_in, c_out=None):
    c_out = c_out or c_in
    return c_in * c_out + 2 * c_out


def _gate(channels, reduction=16, bias=True):
    hidden = channels // reduction
    return 2 * channels * hidden + bias * (channels + hidden)


def _gates(depth, reduction=16, bias=True):
    return sum(n * _gate(256 << i, reduction, bias) for i, n in enumerate(STAGES[depth]))


def _branches(depth, cardinality, base_width):
    total = 0
    for i, blocks in enumerate(STAGES[depth]):
        width, out = cardinality * base_width << i, 256 << i
        rest = 9 * width * (width // cardinality) + width * out + 4 * width
        total += blocks * (out * width + rest) - (out // 2 if i else 192) * width
    return total


def _bottleneck(filters):
    return 17 * filters**2 + 2 * 6 * filters


def _wide(blocks, width):
    total = 16 * 27 + 10 * (64 * width + 1) + 2 * 64 * width
    c_in = 16
    for filters in (16 * width, 32 * width, 64 * width):
        total += 10 * c_in * filters + 2 * c_in  # the block that projects
        total += (2 * blocks - 1) * (9 * filters**2 + 2 * filters)
        c_in = filters
    return total


# What a row without a count adds to one that has it: {row: (base, difference)}.
DERIVED = {
    ("resnet18", '{"shortcut": "C"}', "1000"): (
        ("resnet18", '{"shortcut": "B"}', "1000"),
        sum(n * _projection(64 << i) for i, n in enumerate((2, 1, 1, 1))),
    ),
    ("resnet34", '{"shortcut": "C"}', "1000"): (
        ("resnet34", '{"shortcut": "B"}', "1000"),
        sum(n * _projection(64 << i) for i, n in enumerate((3, 3, 5, 2))),
    ),
    ("resnet50", '{"shortcut": "C", "stride_in": "1x1"}', "1000"): (
        ("resnet50", HE, "1000"),
        sum(n * _projection(256 << i) for i, n in enumerate((2, 3, 5, 2))),
    ),
    ("cifar_resnet44", '{"shortcut": "B"}', "10"): (
        ("cifar_resnet44", '{"shortcut": "A"}', "10"),
        _projection(16, 32) + _projection(32, 64),
    ),
    ("cifar_resnet1202", '{"shortcut": "C"}', "10"): (
        ("cifar_resnet1202", '{"shortcut": "B"}', "10"),
        200 * _projection(16) + 199 * (_projection(32) + _projection(64)),
    ),
    # 18 blocks a stage become 111.
    ("cifar_resnet1001", "", "10"): (
        ("cifar_resnet164", "", "10"),
        93 * sum(map(_bottleneck, (16, 32, 64))),
    ),
    ("cifar_preact_resnet1001", "", "100"): (("cifar_preact_resnet1001", "", "10"), 90 * 257),
    # Projections lose their norms; the others only move.
    ("preact_resnet34", "", "1000"): (
        ("resnet34", '{"shortcut": "B"}', "1000"),
        -2 * (128 + 256 + 512),
    ),
    ("preact_resnet200", "", "1000"): (("preact_resnet200", HE, "1000"), 0),
    ("resnext50_32x4d", '{"cardinality": 4, "base_width": 24}', "1000"): (
        ("resnext50_32x4d", "", "1000"),
        _branches(50, 4, 24) - _branches(50, 32, 4),
    ),
    ("resnext101_32x4d", '{"cardinality": 8, "base_width": 14}', "1000"): (
        ("resnext101_32x4d", "", "1000"),
        _branches(101, 8, 14) - _branches(101, 32, 4),
    ),
    ("resnext152_64x4d", "", "1000"): (
        ("resnext152_32x4d", "", "1000"),
        _branches(152, 64, 4) - _branches(152, 32, 4),
    ),
    ("cifar_resnext29_16x64d", "", "100"): (("cifar_resnext29_16x64d", "", "10"), 90 * 1025),
    ("se_resnet152", HE, "1000"): (("resnet152", HE, "1000"), _gates(152)),
    ("se_resnext101_32x8d", "", "1000"): (("resnext101_32x8d", "", "1000"), _gates(101)),
    ("se_resnet50", '{"stride_in": "1x1", "se_reduction": 8, "se_bias": false}', "1000"): (
        ("resnet50", HE, "1000"),
        _gates(50, 8, bias=False),
    ),
    ("se_resnet50", '{"stride_in": "1x1", "se_stages": [3]}', "1000"): (
        ("resnet50", HE, "1000"),
        4 * _gate(512),
    ),
    ("wrn40_4", "", "10"): (("wrn28_10", "", "10"), _wide(6, 4) - _wide(4, 10)),
    # 18 units a stage.
    ("cifar_se_preact_resnet110", "", "10"): (
        ("cifar_preact_resnet110", '{"shortcut": "A"}', "10"),
        18 * sum(map(_gate, (16, 32, 64))),
    ),
    ("cifar_se_preact_resnet164", "", "10"): (
        ("cifar_preact_resnet164", "", "10"),
        18 * sum(map(_gate, (64, 128, 256))),
    ),
    ("se_googlenet", "", "1000"): (
        ("googlenet", "", "1000"),
        sum(map(_gate, (256, 480, 512, 512, 512, 528, 832, 832, 1024))),
    ),
    ("se_inception_v4", "", "1000"): (
        ("inception_v4", "", "1000"),
        4 * _gate(384) + 7 * _gate(1024) + 3 * _gate(1536),
    ),
    # A gate before the branch has the channels of the block's input.
    ("se_resnet50", '{"stride_in": "1x1", "se_integration": "pre"}', "1000"): (
        ("resnet50", HE, "1000"),
        _gate(64) + sum(n * _gate(256 << i) for i, n in enumerate((3, 4, 6, 2))),
    ),
}


@each_row(counted=False)
def test_counts_follow_from_a_published_one(row):
    base, difference = DERIVED[_key(row)]
    assert _count(row).params == int(COUNTS[base]) + difference


@pytest.mark.long
def test_option_c_projects_thirteen_times_more_than_b_in_resnet34():
    b, c = (resflax.count(create_model("resnet34", shortcut=s), (224, 224, 3)) for s in "BC")
    # A projection costs the same in every stage: twice the channels on a quarter of the pixels.
    assert c.macs - b.macs == 13 * 64**2 * 56**2


def test_published_rows_are_read_as_they_stand_in_the_file():
    rows = table()
    assert len(rows) == len(ROWS)
    for row, line in zip(rows, ROWS, strict=True):
        assert [row.model, str(row.num_classes), str(row.input_size)] == [
            line[field] for field in ("model", "num_classes", "input_size")
        ]
        assert row.overrides == json.loads(line["overrides"] or "{}")
        assert row.params == (int(line["params"]) if line["params"] else None)
        assert row.gmacs == (float(line["gmacs"]) if line["gmacs"] else None)
        assert [row.top1, row.top5, row.source] == [line[f] for f in ("top1", "top5", "source")]


def test_published_rows_are_found_by_name():
    rows = published("cifar_plain110")
    assert [row.top1 for row in rows] == [">60", "fail(>20)"]
    assert {row.source.split("; ")[1][:18] for row in rows} == {
        "errors: 1512.03385",
        "errors: 1603.05027",
    }
    assert published("resnet51") == ()


def test_every_error_has_its_source():
    for row in table():
        assert row.source.startswith("count: ")
        numbers = [top for top in (row.top1, row.top5) if top]
        assert all(re.fullmatch(r"\d+\.\d+|>60|fail\(>20\)", top) for top in numbers)
        assert bool(numbers) == ("errors: " in row.source)


SMALL = {
    "depth": 14,
    "num_classes": 10,
    "stem": "cifar",
    "num_filters": 16,
    "cardinality": 4,
    "base_width": 16,
}

# Checkpoints and scripts name parameters by these paths: a change here breaks them.
FROZEN = """
head/bias 10
head/kernel 512x10
stage2_block1/conv1/kernel 1x1x16x16
stage2_block1/conv2/kernel 3x3x4x16
stage2_block1/conv3/kernel 1x1x16x64
stage2_block1/norm1/bias 16
stage2_block1/norm1/scale 16
stage2_block1/norm2/bias 16
stage2_block1/norm2/scale 16
stage2_block1/norm3/bias 64
stage2_block1/norm3/scale 64
stage2_block1/se/excite/bias 64
stage2_block1/se/excite/kernel 4x64
stage2_block1/se/squeeze/bias 4
stage2_block1/se/squeeze/kernel 64x4
stage2_block1/shortcut/conv/kernel 1x1x16x64
stage2_block1/shortcut/norm/bias 64
stage2_block1/shortcut/norm/scale 64
stage3_block1/conv1/kernel 1x1x64x32
stage3_block1/conv2/kernel 3x3x8x32
stage3_block1/conv3/kernel 1x1x32x128
stage3_block1/norm1/bias 32
stage3_block1/norm1/scale 32
stage3_block1/norm2/bias 32
stage3_block1/norm2/scale 32
stage3_block1/norm3/bias 128
stage3_block1/norm3/scale 128
stage3_block1/se/excite/bias 128
stage3_block1/se/excite/kernel 8x128
stage3_block1/se/squeeze/bias 8
stage3_block1/se/squeeze/kernel 128x8
stage3_block1/shortcut/conv/kernel 1x1x64x128
stage3_block1/shortcut/norm/bias 128
stage3_block1/shortcut/norm/scale 128
stage4_block1/conv1/kernel 1x1x128x64
stage4_block1/conv2/kernel 3x3x16x64
stage4_block1/conv3/kernel 1x1x64x256
stage4_block1/norm1/bias 64
stage4_block1/norm1/scale 64
stage4_block1/norm2/bias 64
stage4_block1/norm2/scale 64
stage4_block1/norm3/bias 256
stage4_block1/norm3/scale 256
stage4_block1/se/excite/bias 256
stage4_block1/se/excite/kernel 16x256
stage4_block1/se/squeeze/bias 16
stage4_block1/se/squeeze/kernel 256x16
stage4_block1/shortcut/conv/kernel 1x1x128x256
stage4_block1/shortcut/norm/bias 256
stage4_block1/shortcut/norm/scale 256
stage5_block1/conv1/kernel 1x1x256x128
stage5_block1/conv2/kernel 3x3x32x128
stage5_block1/conv3/kernel 1x1x128x512
stage5_block1/norm1/bias 128
stage5_block1/norm1/scale 128
stage5_block1/norm2/bias 128
stage5_block1/norm2/scale 128
stage5_block1/norm3/bias 512
stage5_block1/norm3/scale 512
stage5_block1/se/excite/bias 512
stage5_block1/se/excite/kernel 32x512
stage5_block1/se/squeeze/bias 32
stage5_block1/se/squeeze/kernel 512x32
stage5_block1/shortcut/conv/kernel 1x1x256x512
stage5_block1/shortcut/norm/bias 512
stage5_block1/shortcut/norm/scale 512
stem/conv/kernel 3x3x3x16
stem/norm/bias 16
stem/norm/scale 16
"""


def _shapes(model, collection="params", size=16):
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    leaves = jax.tree_util.tree_leaves_with_path(variables[collection])
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): "x".join(map(str, leaf.shape))
        for path, leaf in leaves
    }


@pytest.mark.long
def test_parameter_paths_and_shapes_are_frozen():
    model = create_model("se_resnext50_32x4d", **SMALL)
    frozen = dict(line.split() for line in FROZEN.split("\n") if line)
    assert _shapes(model) == frozen


@pytest.mark.long
def test_statistics_stand_beside_the_parameters_of_their_norms():
    model = create_model("se_resnext50_32x4d", **SMALL)
    norms = {path.removesuffix("/scale") for path in _shapes(model) if path.endswith("/scale")}
    statistics = _shapes(model, "batch_stats")
    assert set(statistics) == {f"{norm}/{kind}" for norm in norms for kind in ("mean", "var")}


def test_list_models_is_sorted_and_takes_patterns():
    names = resflax.list_models()
    assert names == sorted(names)
    assert {row["model"] for row in ROWS} <= set(names)
    assert resflax.list_models("se_resnext50*") == ["se_resnext50_32x4d"]
    assert resflax.list_models("plain??") == ["plain18", "plain34"]
    assert resflax.list_models("*densenet_of_nobody*") == []


@pytest.mark.parametrize("name", resflax.list_models())
def test_every_name_builds(name):
    assert create_model(name).num_classes == (10 if name.startswith(("cifar_", "wrn")) else 1000)


@pytest.mark.parametrize(
    ("name", "overrides", "right"),
    [
        ("se_resnext50_32x4", {}, "se_resnext50_32x4d"),
        ("zzz", {}, "list_models"),
        ("resnet50", {"colour": 3}, "depth, .*shortcut, .*se_reduction, .*dtype"),
        ("resnet50", {"shortcut": "Z"}, "'A', 'B', 'C', 'D', 'none'"),
        ("resnet50", {"unit": "Z"}, "'original', .*'full_preact'"),
        ("resnet50", {"stem": "Z"}, "'imagenet', 'cifar', 'deep'"),
        ("resnet50", {"stride_in": "5x5"}, "'1x1', '3x3'"),
        ("se_resnet50", {"se_gate": "Z"}, "'sigmoid', 'tanh', 'relu'"),
        ("se_resnet50", {"se_squeeze": "Z"}, "'avg', 'max', 'none'"),
        ("se_resnet50", {"se_integration": "Z"}, "'standard', 'pre', 'post', 'identity', '3x3'"),
        ("cifar_resnet20", {"block": "Z"}, "'basic', 'bottleneck'"),
        ("resnet50", {"depth": 51}, "18, 26, 34, 50, 101, 152, 200"),
        ("cifar_resnet20", {"depth": 51}, r"6n \+ 2.* 44, 50, 56"),
        ("cifar_resnet164", {"depth": 51}, r"9n \+ 2.* 47, 56"),
        ("cifar_resnet20", {"depth": 2}, "8, 14, 20"),
        ("resnext50_32x4d", {"cardinality": 48}, "1, 2, 4, 8, 16, 32, 64, 128, 256"),
        ("resnext50_32x4d", {"cardinality": 0}, "at least 1"),
        ("resnet18", {"cardinality": 32}, "bottleneck.*50, 101, 152, 200"),
        ("resnet18", {"base_width": 4}, "bottleneck.*50, 101, 152, 200"),
        ("resnet50", {"base_width": 1, "num_filters": 4}, "at least 16"),
        ("resnet50", {"base_width": 1, "halve_first": True}, "at least 2"),
        ("resnet50", {"block": "basic"}, "has no argument 'block'"),
        ("cifar_resnet20", {"zero_init_last": True, "unit": "relu_before_addition"}, "other units"),
        ("cifar_se_resnet110", {"se_integration": "identity", "shortcut": "none"}, "a shortcut"),
        ("se_resnet50", {"se_stages": [1, 6]}, "2, 3, 4, 5"),
        ("cifar_se_resnet110", {"se_stages": [5]}, "2, 3, 4 "),
        ("se_resnet18", {"se_integration": "3x3"}, "bottleneck"),
        ("se_resnet50", {"se_reduction": 257}, "at most 256"),
        ("se_resnet50", {"se_reduction": 65, "se_integration": "pre"}, "at most 64"),
        ("senet154", {"se_reduction": 129, "se_integration": "pre"}, "at most 128"),
        ("se_resnet50", {"se_reduction": 513, "se_stages": [3, 4]}, "at most 512"),
        ("se_resnext50_32x4d", {"se_reduction": 129, "se_integration": "3x3"}, "at most 128"),
        ("se_resnet50", {"se_reduction": -1}, "0 .*or more"),
        ("resnet50", {"num_classes": 0}, "at least 1"),
        ("resnet50", {"dropout": 1.0}, "less than 1"),
    ],
)
def test_wrong_choices_are_told_what_would_be_right(name, overrides, right):
    with pytest.raises(ValueError, match=right) as caught:
        create_model(name, **overrides)
    assert next(iter(overrides), name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "right"),
    [
        ("resnet50", (1, 63, 64, 3), "small .*'imagenet'.*stem='cifar' is for up to 128"),
        ("resnet50", (1, 64, 63, 3), "any_size=True"),
        ("senet154", (1, 16, 16, 3), "'deep'"),
        ("cifar_resnet20", (1, 32, 129, 3), "large .*stem='imagenet' is for 64 and more"),
        ("cifar_resnet20", (1, 0, 8, 3), "none"),
        ("cifar_resnet20", (32, 32, 3), r"\[N, H, W, C\]"),
        ("resnet18", (1, 1, 64, 64, 3), r"\[N, H, W, C\]"),
    ],
)
def test_wrong_images_are_told_what_would_be_right(name, shape, right):
    model = create_model(name)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(ValueError, match=right) as caught:
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    said = " x ".join(map(str, shape[1:3])) if len(shape) == 4 else str(shape)
    assert said in str(caught.value)


@pytest.mark.long
def test_the_smallest_images_fit():
    assert resflax.count(create_model("resnet18"), (64, 64, 3)).output_shape == (1000,)
    forced = create_model("resnet18", any_size=True)
    assert resflax.count(forced, (1, 1, 3)).output_shape == (1000,)
    assert resflax.count(create_model("cifar_resnet20"), (1, 1, 3)).output_shape == (10,)


@pytest.mark.parametrize(
    ("name", "overrides", "right"),
    [
        ("resnet18", {"act": 3}, "act 3 must be of type str"),
        ("resnet18", {"se_bias": "no"}, "se_bias 'no' must be of type bool"),
        ("resnet18", {"bn_epsilon": float("nan")}, "bn_epsilon nan must be a finite number"),
        ("cifar_resnet20", {"depth": 2**31}, "at most 65,536"),
        ("bn_inception", {"conv_bias": "some"}, "conv_bias 'some' is not one of 'none', 'all'"),
    ],
)
def test_a_value_of_another_type_is_refused(name, overrides, right):
    with pytest.raises(UserError, match=re.escape(right)):
        create_model(name, **overrides)


def test_bn_inception_takes_biases_by_the_name_that_others_have():
    assert create_model("bn_inception", conv_bias=True).conv_bias == "all"
    assert create_model("bn_inception", conv_bias="none") == create_model("bn_inception")
