"""Tests of the residual block and its networks: each axis, and parity with a plain forward pass."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import resflax
from resflax.models import axes, layers, residual, resnet
from resflax.models.gates import GATES, SqueezeExcite, gate_units
from resflax.models.residual import UNITS, Unit
from resflax.models.shortcuts import SHORTCUTS, zero_padded_identity

pytestmark = pytest.mark.devices(1, 8, long=8)

LINEAR_SUM = Unit(after=("norm", "act"), last=("norm",))
# Compiling takes nearly all of the time here.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TINY = {"depth": 8, "num_filters": 4, "num_classes": 5}


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _block(branch, shortcut="B", unit="original", train=False, **settings):
    unit = UNITS[unit] if isinstance(unit, str) else unit
    norm = functools.partial(nn.BatchNorm, use_running_average=not train)
    parts = layers.Parts(layers.Conv, norm, layers.act("relu"), train, jnp.float32)
    spec = residual.BlockSpec(branch, SHORTCUTS[shortcut], unit, parts, **settings)
    return residual.ResidualBlock(spec)


def _init(module, x, **kwargs):
    # The generator that compiles fastest.
    key = jax.random.key(0, impl="rbg")
    return jit(functools.partial(module.init, **kwargs))(key, x)


def _trained(module, x, **kwargs):
    """Variables as after some training: no scale is one and no bias or mean zero. In numpy."""
    shapes = jax.eval_shape(functools.partial(module.init, **kwargs), jax.random.key(0), x)
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        if path[-1].key == "kernel":
            values = rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        else:
            values = rng.uniform(-0.5, 0.5, leaf.shape) + (path[-1].key in ("scale", "var"))
        return values.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def _apply(module, variables, x, **kwargs):
    out = jit(functools.partial(module.apply, **kwargs))(variables, x)
    return jax.tree.map(np.asarray, out)


def _tiny(name="cifar_resnet20", **overrides):
    return resflax.create_model(name, **(TINY | overrides))


def _assert_close(actual, expected, tolerance=1e-5):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


# --- shortcuts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_option_a_subsamples_and_appends_zeros(size, stride):
    x = _normal(0, 2, *size, 3)
    expected = np.zeros((2, -(-size[0] // stride), -(-size[1] // stride), 8), np.float32)
    for row in range(expected.shape[1]):
        for column in range(expected.shape[2]):
            expected[:, row, column, :3] = x[:, row * stride, column * stride]
    np.testing.assert_array_equal(zero_padded_identity(x, 8, stride), expected)


def test_option_a_refuses_to_shrink():
    with pytest.raises(ValueError, match="8 channels to 7: use 'B' or 'C'"):
        zero_padded_identity(jnp.zeros((1, 4, 4, 8)), 7, 1)
    # The deep stem gives out more channels than the first stage of basic blocks.
    with pytest.raises(ValueError, match="128 channels to 64"):
        resflax.count(resflax.create_model("resnet18", stem="deep", shortcut="A"), (64, 64, 3))


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("block", "shortcut", "projecting"),
    [
        ("basic", "A", ()),
        ("basic", "none", ()),
        ("basic", "B", ("stage3_block1", "stage4_block1")),
        ("basic", "C", tuple(f"stage{s}_block{i}" for s in (2, 3, 4) for i in (1, 2))),
        ("bottleneck", "A", ()),
        ("bottleneck", "B", ("stage2_block1", "stage3_block1", "stage4_block1")),
        ("bottleneck", "C", tuple(f"stage{s}_block{i}" for s in (2, 3, 4) for i in (1, 2))),
        ("bottleneck", "D", ("stage2_block1", "stage3_block1", "stage4_block1")),
    ],
)
def test_only_the_blocks_of_the_option_project(block, shortcut, projecting):
    model = _tiny(depth=14 if block == "basic" else 20, block=block, shortcut=shortcut)
    params = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    )["params"]
    assert (
        tuple(name for name, parts in sorted(params.items()) if "shortcut" in parts) == projecting
    )
    assert all(set(params[name]["shortcut"]) == {"conv", "norm"} for name in projecting)


def test_a_plain_net_has_the_parameters_of_option_a_and_another_output():
    x = _normal(0, 2, 8, 8, 3)
    variables = _trained(_tiny(shortcut="A"), x, train=False)
    plain = _trained(_tiny(shortcut="none"), x, train=False)
    jax.tree.map(np.testing.assert_array_equal, variables, plain)
    with_a, without = (_apply(_tiny(shortcut=s), variables, x, train=False) for s in ("A", "none"))
    assert np.abs(with_a - without).max() > 0.1


def test_a_plain_block_is_its_branch():
    x = _normal(0, 2, 6, 6, 8)
    block = _block(residual.basic(8), "none", LINEAR_SUM)
    variables = _trained(block, x)
    with_identity = _apply(_block(residual.basic(8), "A", LINEAR_SUM), variables, x)
    _assert_close(_apply(block, variables, x), with_identity - x)


def test_option_d_projects_the_means_of_windows():
    x = _normal(0, 2, 5, 6, 3)
    norm = functools.partial(nn.BatchNorm, use_running_average=True)
    layer = SHORTCUTS["D"](8, 1, 2, layers.Conv, norm)
    variables = _trained(layer, x)
    means = np.zeros((2, 3, 3, 3), np.float32)
    for row, column in np.ndindex(3, 3):
        means[:, row, column] = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean(
            (1, 2)
        )
    expected = _norm(means @ variables["params"]["conv"]["kernel"][0, 0], variables, "norm")
    _assert_close(_apply(layer, variables, x), expected)
    # Where nothing is halved, it is option B.
    d, b = (SHORTCUTS[option](8, 1, 1, layers.Conv, norm) for option in "DB")
    np.testing.assert_array_equal(_apply(d, variables, x), _apply(b, variables, x))


# --- units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
def test_each_unit_is_that_of_the_figure(unit):
    x = _normal(0, 2, 5, 6, 8)
    block = _block(residual.basic(8), "A", unit)
    variables = _trained(block, x)
    c1, c2 = (
        functools.partial(_convolve, kernel=variables["params"][conv]["kernel"], stride=1)
        for conv in ("conv1", "conv2")
    )
    n1, n2, n_sum = (
        functools.partial(lambda name, y: _norm(y, variables, name), name)
        for name in ("norm1", "norm2", "norm_sum")
    )
    relu = functools.partial(np.maximum, 0)
    expected = {
        "original": lambda: relu(x + n2(c2(relu(n1(c1(x)))))),
        "bn_after_addition": lambda: relu(n_sum(x + c2(relu(n1(c1(x)))))),
        "relu_before_addition": lambda: x + relu(n2(c2(relu(n1(c1(x)))))),
        "relu_only_preact": lambda: x + n2(c2(relu(n1(c1(relu(x)))))),
        "full_preact": lambda: x + c2(relu(n2(c1(relu(n1(x)))))),
        "relu_around_addition": lambda: relu(x + relu(n2(c2(relu(n1(c1(x))))))),
    }[unit]()
    _assert_close(_apply(block, variables, x), expected)


@pytest.mark.first(2)
@pytest.mark.parametrize("branch", [residual.basic(8), residual.bottleneck(2)])
@pytest.mark.parametrize(
    "unit", ["original", "relu_before_addition", "relu_only_preact", "full_preact"]
)
def test_a_unit_with_zero_init_starts_as_the_identity(unit, branch):
    x = _normal(0, 2, 6, 6, 8)
    evaluated, trained = (_block(branch, "A", unit, t, zero_init_last=True) for t in (False, True))
    variables = _init(evaluated, x)
    expected = np.maximum(x, 0) if unit == "original" else x
    np.testing.assert_array_equal(_apply(evaluated, variables, x), expected)
    y, _ = _apply(trained, variables, x, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, expected)


def test_bn_after_addition_with_zero_init_starts_as_the_normalised_identity():
    x = _normal(0, 2, 6, 6, 8)
    block = _block(residual.basic(8), "A", "bn_after_addition", zero_init_last=True)
    _assert_close(_apply(block, _init(block, x), x), np.maximum(x, 0) / np.sqrt(1 + 1e-5))


@pytest.mark.first(1)
@pytest.mark.parametrize("unit", UNITS)
def test_without_zero_init_no_unit_starts_as_the_identity(unit):
    x = _normal(0, 2, 6, 6, 8)
    block = _block(residual.basic(8), "A", unit)
    y = _apply(block, _init(block, x), x)
    assert np.abs(y - (np.maximum(x, 0) if UNITS[unit].sum else x)).max() > 0.1


def _pre_activated(variables, x):
    return np.maximum(_norm(x, variables, "norm1"), 0)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_preact_unit_that_reshapes_takes_the_pre_activated_input(shortcut, first):
    x = _normal(0, 2, 5, 6, 8)
    block = _block(residual.basic(16, 2), shortcut, "full_preact", activated=first)
    variables = _trained(block, x)
    variables["params"]["conv2"]["kernel"] *= 0
    assert ("norm1" in variables["params"]) is not first
    source = x if first else _pre_activated(variables, x)
    if shortcut == "A":
        expected = np.pad(source[:, ::2, ::2], [(0, 0)] * 3 + [(0, 8)])
    else:
        assert set(variables["params"]["shortcut"]) == {"conv"}
        expected = source[:, ::2, ::2] @ variables["params"]["shortcut"]["conv"]["kernel"][0, 0]
    _assert_close(_apply(block, variables, x), expected)


def test_a_preact_unit_that_keeps_the_shape_passes_its_raw_input():
    x = _normal(0, 2, 5, 6, 8)
    block = _block(residual.basic(8), "B", "full_preact")
    variables = _trained(block, x)
    variables["params"]["conv2"]["kernel"] *= 0
    np.testing.assert_array_equal(_apply(block, variables, x), x)


def test_a_preact_network_norms_once_more_before_the_head():
    x = _normal(0, 2, 8, 8, 3)
    original, preact = (
        _trained(_tiny(unit=u), x, train=False)["params"] for u in ("original", "full_preact")
    )
    assert set(preact) - set(original) == {"norm"}
    assert "norm1" not in preact["stage2_block1"]
    assert preact["stage3_block1"]["norm1"]["scale"].shape == (4,)


@pytest.mark.first(1)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("unit", UNITS)
def test_gradients_reach_every_parameter(unit, shortcut):
    x = _normal(0, 4, 6, 6, 3)
    model = resnet.ResNet(
        (1, 1),
        num_classes=5,
        block="basic",
        num_filters=4,
        stem="cifar",
        shortcut=shortcut,
        unit=unit,
        se_reduction=1,
    )
    variables = _trained(model, x, train=False)

    # With the batch's own statistics a norm would cancel the bias of the norm before it.
    @jit
    @jax.grad
    def grads(params):
        logits = model.apply(variables | {"params": params}, x, train=False)
        return jnp.sum(logits * _normal(1, 4, 5))

    for path, grad in jax.tree_util.tree_leaves_with_path(grads(variables["params"])):
        assert np.abs(grad).max() > 1e-5, jax.tree_util.keystr(path)


# A ReLU after the last norm has no slope at zero: such a unit cannot leave the identity.
@pytest.mark.first(1)
@pytest.mark.parametrize("unit", [u for u in UNITS if UNITS[u].last[-1:] != ("act",)])
def test_zero_init_leaves_a_way_out_of_the_identity(unit):
    x = _normal(0, 2, 6, 6, 8)
    block = _block(residual.basic(8), "A", unit, True, zero_init_last=True)
    variables = _init(block, x)

    def loss(params):
        y, _ = block.apply(variables | {"params": params}, x, mutable=["batch_stats"])
        return jnp.sum(y * _normal(1, *y.shape))

    grads = jit(jax.grad(loss))(variables["params"])
    last = grads["norm2"]["scale"] if "norm" in UNITS[unit].last else grads["conv2"]["kernel"]
    assert np.abs(last).max() > 1e-3


# --- gates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", axes.CHOICES["se_integration"])
def test_gates_have_the_channels_of_their_place(placement):
    gate = functools.partial(SqueezeExcite, 2)
    block = _block(residual.bottleneck(4, 2), "B", gate=gate, se_integration=placement)
    params = _trained(block, _normal(0, 1, 4, 4, 8))["params"]["se"]
    channels = {"pre": 8, "3x3": 4}.get(placement, 16)
    assert params["squeeze"]["kernel"].shape == (channels, channels // 2)
    assert params["excite"]["kernel"].shape == (channels // 2, channels)


@pytest.mark.first(1)
@pytest.mark.parametrize("placement", axes.CHOICES["se_integration"])
def test_gates_scale_what_stands_at_their_place(placement):
    x = _normal(0, 2, 5, 6, 8)
    branch = residual.bottleneck(2, base_width=256)
    gate = functools.partial(SqueezeExcite, 2, gate="tanh")
    gated = _block(branch, "A", gate=gate, se_integration=placement)
    variables = _trained(gated, x)
    params, stats = variables["params"], variables["batch_stats"]
    # Gates of -1/2 everywhere: a negative one tells whether the last ReLU stands before it.
    params["se"]["excite"]["kernel"] *= 0
    params["se"]["excite"]["bias"][:] = -np.arctanh(0.5)
    # Without an offset, half of the 3x3 convolution's output is half of the branch.
    params["norm3"]["bias"] *= 0
    stats["norm3"]["mean"] *= 0
    plain = {"params": {k: v for k, v in params.items() if k != "se"}, "batch_stats": stats}
    branch_of = functools.partial(_apply, _block(branch, "none", LINEAR_SUM), plain)
    expected = {
        "standard": lambda: np.maximum(x - branch_of(x) / 2, 0),
        "3x3": lambda: np.maximum(x - branch_of(x) / 2, 0),
        "pre": lambda: np.maximum(x + branch_of(-x / 2), 0),
        "identity": lambda: np.maximum(-x / 2 + branch_of(x), 0),
        "post": lambda: np.maximum(x + branch_of(x), 0) / -2,
    }[placement]()
    _assert_close(_apply(gated, variables, x), expected)


def test_a_gate_behind_the_sum_scales_the_shortcut_where_a_norm_ends_the_branch():
    x = _normal(0, 2, 5, 6, 8)
    branch, unit = residual.bottleneck(2, base_width=256), residual.UNITS["relu_only_preact"]
    gate = functools.partial(SqueezeExcite, 2)
    gated = _block(branch, "A", unit, gate=gate, se_integration="post")
    variables = _trained(gated, x)
    params = variables["params"]
    plain = {k: v for k, v in params.items() if k != "se"}
    summed = _apply(_block(branch, "A", unit), variables | {"params": plain}, x)
    expected = _apply(SqueezeExcite(2), {"params": params["se"]}, summed)
    _assert_close(_apply(gated, variables, x), expected)


@pytest.mark.parametrize(
    ("squeeze", "gate", "bias"),
    [
        ("avg", "sigmoid", True),
        ("avg", "tanh", False),
        ("max", "relu", True),
        ("max", "sigmoid", False),
        ("none", "sigmoid", True),
    ],
)
def test_squeeze_excite_is_its_definition(squeeze, gate, bias):
    x = _normal(0, 2, 3, 4, 8)
    layer = SqueezeExcite(4, squeeze, gate, bias)
    variables = _trained(layer, x)
    squeezing, exciting = variables["params"]["squeeze"], variables["params"]["excite"]
    assert ("bias" in squeezing) is ("bias" in exciting) is bias
    means = {
        "avg": lambda: x.mean((1, 2), keepdims=True),
        "max": lambda: x.max((1, 2), keepdims=True),
        "none": lambda: x,
    }[squeeze]()
    gates = _dense(np.maximum(_dense(means, squeezing), 0), exciting)
    gates = {"sigmoid": _sigmoid, "tanh": np.tanh, "relu": lambda y: np.maximum(y, 0)}[gate](gates)
    _assert_close(_apply(layer, variables, x), x * gates)


def test_a_sigmoid_gate_lies_between_zero_and_one_and_starts_at_a_half():
    x = np.abs(_normal(0, 4, 3, 3, 8)) + 0.1
    layer = SqueezeExcite(2)
    variables = _trained(layer, x)
    gates = _apply(layer, variables, x) / x
    assert 0 < gates.min() < gates.max() < 1
    for values in variables["params"]["excite"].values():
        values[:] = 0
    np.testing.assert_array_equal(_apply(layer, variables, x), x / 2)


def _gathered(x, extent):
    """The means of the pixels around every extent-th one, as far as they are in the image."""
    reach = extent - 1
    means = np.zeros((len(x), *(-(-n // extent) for n in x.shape[1:3]), x.shape[3]), np.float32)
    for row, column in np.ndindex(means.shape[1:3]):
        top, left = (max(0, i * extent - reach) for i in (row, column))
        part = x[:, top : row * extent + reach + 1, left : column * extent + reach + 1]
        means[:, row, column] = part.mean((1, 2))
    return means


@pytest.mark.parametrize("extent", [0, 2, 4])
def test_gather_excite_without_parameters_is_its_definition(extent):
    x = _normal(0, 2, 5, 6, 8)
    parts = layers.Parts(layers.Conv, nn.BatchNorm, jax.nn.relu, False, jnp.float32)
    layer = parts.bind(GATES["ge_minus"], extent=extent)()
    means = _gathered(x, extent) if extent else x.mean((1, 2), keepdims=True)
    expected = np.zeros_like(x)
    for row, column in np.ndindex(x.shape[1:3]):
        at = row * means.shape[1] // 5, column * means.shape[2] // 6
        expected[:, row, column] = x[:, row, column] * _sigmoid(means[:, *at])
    _assert_close(_apply(layer, {}, x), expected)


@pytest.mark.parametrize("extent", [0, 4])
def test_gather_excite_with_parameters_is_its_definition(extent):
    x = _normal(0, 2, 4, 4, 8)
    norm = functools.partial(nn.BatchNorm, use_running_average=True)
    parts = layers.Parts(layers.Conv, norm, jax.nn.relu, False, jnp.float32)
    layer = parts.bind(GATES["ge"], extent=extent)()
    variables = _trained(layer, x)
    params = variables["params"]
    if extent:
        y = x
        for i in (1, 2):
            kernel = params[f"conv{i}"]["kernel"]
            assert kernel.shape == (3, 3, 1, 8)
            y = lax.conv_general_dilated(
                y, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=8,
            )  # fmt: skip
            y = _norm(np.asarray(y), variables, f"norm{i}")
            y = np.maximum(y, 0) if i == 1 else y
    else:
        y = np.sum(x * params["conv1"]["kernel"][:, :, 0], axis=(1, 2), keepdims=True)
        y = _norm(y, variables, "norm1")
    assert y.shape[1:3] == (1, 1)
    _assert_close(_apply(layer, variables, x), x * _sigmoid(y))


def test_an_extent_is_a_power_of_two():
    gate = functools.partial(GATES["ge_minus"], extent=3)
    with pytest.raises(ValueError, match="extent 3 must be 0"):
        resflax.count(_tiny(gate=gate), (8, 8, 3))


# --- branches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "cardinality", "base_width", "width"),
    [(64, 1, 64, 64), (64, 32, 4, 128), (512, 32, 4, 1024), (64, 8, 14, 112), (16, 4, 6, 4)],
)
def test_the_width_of_a_path_is_rounded_down(filters, cardinality, base_width, width):
    specs = residual.bottleneck(filters, cardinality=cardinality, base_width=base_width)
    assert [spec.filters for spec in specs] == [width, width, 4 * filters]
    assert [spec.groups for spec in specs] == [1, cardinality, 1]


@pytest.mark.parametrize("cardinality", [2, 8])
def test_a_grouped_bottleneck_is_a_dense_one_with_a_block_diagonal_kernel(cardinality):
    x = _normal(0, 2, 5, 6, 12)
    width = 16 // cardinality
    paths = {"cardinality": cardinality, "base_width": 16 * width}
    grouped = _block(residual.bottleneck(4, 2, **paths))
    dense = _block(residual.bottleneck(4, 2, base_width=256))
    variables = _trained(grouped, x)
    expected = _apply(grouped, variables, x)
    kernel = np.zeros((3, 3, 16, 16), np.float32)
    for i in range(cardinality):
        path = slice(i * width, (i + 1) * width)
        kernel[:, :, path, path] = variables["params"]["conv2"]["kernel"][..., path]
    variables["params"]["conv2"]["kernel"] = kernel
    _assert_close(_apply(dense, variables, x), expected)


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["resnet50", "preact_resnet50", "se_resnext50_32x4d"])
def test_the_place_of_the_stride_changes_the_work_but_no_parameter(name):
    first, second = (
        resflax.count(resflax.create_model(name, depth=14, stride_in=s), (64, 64, 3))
        for s in ("1x1", "3x3")
    )
    assert first.params == second.params
    assert first.macs < second.macs
    assert first.output_shape == second.output_shape


# --- networks ------------------------------------------------------------------------------------


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["cifar_se_resnet110", "cifar_preact_resnet110"])
def test_a_permuted_batch_permutes_the_logits(name):
    x, order = _normal(0, 6, 8, 8, 3), [3, 1, 5, 0, 4, 2]
    model = _tiny(name, **({"se_reduction": 2} if "se" in name.split("_") else {}))
    variables = _trained(model, x, train=False)
    logits = _apply(model, variables, x, train=False)
    assert np.abs(logits - logits[order]).max() > 0.01
    _assert_close(_apply(model, variables, x[order], train=False), logits[order])


@pytest.mark.long
def test_training_alone_updates_the_statistics():
    x = 1 + _normal(0, 4, 8, 8, 3)
    model = _tiny(bn_momentum=0.75)
    variables = _trained(model, x, train=False)

    def statistics(train):
        _, updates = _apply(model, variables, x, train=train, mutable=["batch_stats"])
        return updates["batch_stats"]

    jax.tree.map(np.testing.assert_array_equal, statistics(False), variables["batch_stats"])
    trained = statistics(True)
    for before, after in zip(
        *map(jax.tree.leaves, (variables["batch_stats"], trained)), strict=True
    ):
        assert np.all(before != after)
    kernel = variables["params"]["stem"]["conv"]["kernel"]
    mean = _convolve(x, kernel, 1).mean((0, 1, 2))
    old = variables["batch_stats"]["stem"]["norm"]["mean"]
    _assert_close(trained["stem"]["norm"]["mean"], 0.75 * old + 0.25 * mean)


@pytest.mark.long
def test_bfloat16_computes_in_bfloat16_and_keeps_the_rest_in_float32():
    x = _normal(0, 2, 8, 8, 3)
    model = _tiny("cifar_se_resnet110", se_reduction=2, dtype=jnp.bfloat16)
    variables = _trained(model, x, train=False)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {"float32"}
    logits, inner = _apply(model, variables, x, train=False, capture_intermediates=True)
    assert logits.dtype == jnp.float32
    images = [y for y in jax.tree.leaves(inner) if y.ndim == 4]
    assert {str(y.dtype) for y in images} == {"bfloat16"}
    exact = _apply(model.clone(dtype=jnp.float32), variables, x, train=False)
    assert 1e-5 < np.abs(logits - exact).max() / np.abs(exact).max() < 0.05


# --- parity with a plain forward pass, written as torchvision's ----------------------------------


def _convolve(x, kernel, stride):
    side = kernel.shape[0] // 2
    y = lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(side, side), (side, side)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )
    return np.asarray(y)


def _max_pool(x):
    halves = [(0, 0), (1, 1), (1, 1), (0, 0)]
    return np.asarray(lax.reduce_window(x, -np.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), halves))


def _norm(x, variables, *path):
    params, stats = variables["params"], variables["batch_stats"]
    for name in path:
        params, stats = params[name], stats[name]
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    return x * params["scale"] + params["bias"]


def _dense(x, params):
    return x @ params["kernel"] + params.get("bias", 0)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _forward(variables, x, stage_sizes, *, pool):
    """Eval mode; stride in the 3x3 convolution, projections where the parameters have them."""
    params = variables["params"]
    x = _convolve(x, params["stem"]["conv"]["kernel"], 2 if pool else 1)
    x = np.maximum(_norm(x, variables, "stem", "norm"), 0)
    x = _max_pool(x) if pool else x
    for stage, size in enumerate(stage_sizes, 2):
        for i in range(1, size + 1):
            x = _residual(variables, f"stage{stage}_block{i}", x, 2 if stage > 2 and i == 1 else 1)
    return _dense(x.mean((1, 2)), params["head"])


def _residual(variables, name, x, stride):
    params = variables["params"][name]
    convs = sorted(key for key in params if key.startswith("conv"))
    strided = "conv1" if len(convs) == 2 else "conv2"
    y = x
    for conv in convs:
        y = _convolve(y, params[conv]["kernel"], stride if conv == strided else 1)
        y = _norm(y, variables, name, conv.replace("conv", "norm"))
        y = y if conv == convs[-1] else np.maximum(y, 0)
    if "se" in params:
        hidden = np.maximum(_dense(y.mean((1, 2), keepdims=True), params["se"]["squeeze"]), 0)
        y = y * _sigmoid(_dense(hidden, params["se"]["excite"]))
    if "shortcut" in params:
        x = _convolve(x, params["shortcut"]["conv"]["kernel"], stride)
        x = _norm(x, variables, name, "shortcut", "norm")
    return np.maximum(x + y, 0)


IMAGENET = {"depth": 14, "num_filters": 4, "num_classes": 5, "any_size": True}
PATHS = {"cardinality": 4, "base_width": 64, "num_filters": 8}


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("name", "overrides", "stage_sizes", "size"),
    [
        ("cifar_resnet20", TINY | {"shortcut": "B"}, (1, 1, 1), (8, 11)),
        ("cifar_resnet20", TINY | {"shortcut": "C", "depth": 14}, (2, 2, 2), (9, 8)),
        ("resnet18", IMAGENET | {"depth": 10}, (1, 1, 1, 1), (33, 40)),
        ("resnet50", IMAGENET, (1, 1, 1, 1), (64, 48)),
        ("resnet50", IMAGENET, (1, 1, 1, 1), (65, 37)),
        ("se_resnext50_32x4d", IMAGENET | PATHS, (1, 1, 1, 1), (64, 39)),
    ],
)
def test_logits_are_those_of_a_plain_forward_pass(name, overrides, stage_sizes, size):
    x = _normal(0, 2, *size, 3)
    model = resflax.create_model(name, **overrides)
    variables = _trained(model, x, train=False)
    pool = not name.startswith("cifar")
    expected = _forward(variables, x, stage_sizes, pool=pool)
    _assert_close(_apply(model, variables, x, train=False), expected, 1e-4)


@pytest.mark.parametrize(
    ("channels", "divisor", "units"),
    [(64, 1, 4), (72, 1, 4), (16, 8, 8), (64, 8, 8), (176, 8, 8), (192, 8, 16), (320, 8, 24)],
)
def test_hidden_units_of_gates_are_rounded_to_a_multiple_half_upwards(channels, divisor, units):
    assert gate_units(channels, 16, divisor) == units
