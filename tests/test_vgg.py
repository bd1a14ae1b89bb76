"""Tests of VGG: published counts, parity with a plain forward pass, adaptive pooling, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import resflax
from resflax.models.vgg import vgg
from resflax.ops.pool import adaptive_avg_pool

# Compiling takes nearly all of the time here.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TINY = {"depth": 11, "num_filters": 4, "fc_units": 6, "num_classes": 5}


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _trained(model, x):
    """Variables as after some training: no scale is one and no bias or mean zero. In numpy."""
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        if path[-1].key == "kernel":
            values = rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        else:
            values = rng.uniform(-0.5, 0.5, leaf.shape) + (path[-1].key in ("scale", "var"))
        return values.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def _apply(model, variables, x, **kwargs):
    out = jit(functools.partial(model.apply, **kwargs))(variables, x)
    return jax.tree.map(np.asarray, out)


def _assert_close(actual, expected, tolerance=1e-5):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


# --- counts --------------------------------------------------------------------------------------

TORCHVISION = "torchvision 0.28 num_params and _ops"
RECOMPUTED = "recomputed from the definition"
BATCH = {"norm": "batch"}


@pytest.mark.parametrize(
    ("depth", "arguments", "params", "gmacs", "source"),
    [
        (11, {}, 132863336, 7.6091, TORCHVISION),
        (13, {}, 133047848, 11.3085, TORCHVISION),
        (16, {}, 138357544, 15.4703, TORCHVISION),
        (16, BATCH, 138365992, 15.4703, TORCHVISION),
        (19, {}, 143667240, 19.6321, TORCHVISION),
        (19, BATCH, 143678248, 19.6321, TORCHVISION),
        (16, BATCH | {"se_reduction": 16}, 138596784, 15.4705, RECOMPUTED),
    ],
)
def test_counts_are_the_published_ones(depth, arguments, params, gmacs, source):
    counted = resflax.count(vgg(depth, **arguments), (224, 224, 3))
    assert counted.params == params
    assert counted.macs / 1e9 == pytest.approx(gmacs, rel=1e-3)
    assert list(counted.parts)[:2] == ["stage1", "stage2"]


@pytest.mark.parametrize("depth", [11, 13])
def test_norms_add_a_scale_and_an_offset_to_each_channel(depth):
    plain, normed = (resflax.count(vgg(depth, **a), (224, 224, 3)) for a in ({}, BATCH))
    channels = {11: 64 + 128 + 2 * (256 + 512 + 512), 13: 2 * (64 + 128 + 256 + 512 + 512)}
    assert normed.params - plain.params == 2 * channels[depth]
    assert normed.macs == plain.macs


def test_gates_may_go_without_biases():
    gated = BATCH | {"se_reduction": 16}
    with_, without = (
        resflax.count(vgg(11, **gated, se_bias=b), (32, 32, 3)).params for b in (True, False)
    )
    channels = [64, 128, *[256] * 2, *[512] * 4]
    assert with_ - without == sum(c + c // 16 for c in channels)


# --- parity with a plain forward pass ------------------------------------------------------------


def _adaptive(x, size):
    """Means over windows, one by one, as PyTorch defines them."""
    means = np.zeros((x.shape[0], size, size, x.shape[3]), np.float32)
    height, width = x.shape[1:3]
    for i in range(size):
        for j in range(size):
            rows = slice(int(np.floor(i * height / size)), int(np.ceil((i + 1) * height / size)))
            columns = slice(int(np.floor(j * width / size)), int(np.ceil((j + 1) * width / size)))
            means[:, i, j] = x[:, rows, columns].mean((1, 2))
    return means


@pytest.mark.first(3)
@pytest.mark.parametrize("shape", [(7, 7), (1, 1), (2, 3), (6, 8), (14, 21), (10, 13), (7, 9)])
@pytest.mark.parametrize("size", [6, 7])
def test_adaptive_means_are_those_of_their_windows(shape, size):
    x = _normal(0, 2, *shape, 3)
    _assert_close(adaptive_avg_pool(jnp.asarray(x), size), _adaptive(x, size), 1e-6)


def test_maps_of_the_published_size_pass_untouched():
    x = jnp.asarray(_normal(0, 2, 7, 7, 3))
    assert adaptive_avg_pool(x, 7) is x


def _convolve(x, params):
    y = lax.conv_general_dilated(
        x, params["kernel"], (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return np.asarray(y) + params["bias"]


def _dense(x, params):
    return x @ params["kernel"] + params["bias"]


def _halve(x):
    rows, columns = (n // 2 * 2 for n in x.shape[1:3])
    return np.max([x[:, i:rows:2, j:columns:2] for i in (0, 1) for j in (0, 1)], axis=0)


def _forward(variables, x, stage_sizes):
    """Eval mode; norms and gates stand where the parameters have them."""
    params = variables["params"]
    for stage, size in enumerate(stage_sizes, 1):
        own = params[f"stage{stage}"]
        for i in range(1, size + 1):
            x = _convolve(x, own[f"conv{i}"])
            if f"norm{i}" in own:
                stats, norm = variables["batch_stats"][f"stage{stage}"][f"norm{i}"], own[f"norm{i}"]
                x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
                x = x * norm["scale"] + norm["bias"]
            x = np.maximum(x, 0)
            if f"se{i}" in own:
                hidden = np.maximum(
                    _dense(x.mean((1, 2), keepdims=True), own[f"se{i}"]["squeeze"]), 0
                )
                x = x / (1 + np.exp(-_dense(hidden, own[f"se{i}"]["excite"])))
        x = _halve(x)
    x = _adaptive(x, 7).reshape(len(x), -1)
    for name in ("fc6", "fc7"):
        x = np.maximum(_dense(x, params[name]), 0)
    return _dense(x, params["head"])


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("arguments", "stage_sizes", "size"),
    [
        ({}, (1, 1, 2, 2, 2), (32, 41)),
        (BATCH, (1, 1, 2, 2, 2), (67, 40)),
        (BATCH | {"depth": 13, "se_reduction": 2}, (2, 2, 2, 2, 2), (33, 64)),
    ],
)
def test_logits_are_those_of_a_plain_forward_pass(arguments, stage_sizes, size):
    x = _normal(0, 2, *size, 3)
    model = vgg(**(TINY | arguments))
    variables = _trained(model, x)
    expected = _forward(variables, x, stage_sizes)
    _assert_close(_apply(model, variables, x, train=False), expected, 1e-4)


# --- modes ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_training_updates_the_statistics_and_drops_units():
    x = 1 + _normal(0, 2, 32, 32, 3)
    model = vgg(**TINY, **BATCH)
    variables = _trained(model, x)

    @jit
    def train(key):
        rngs = {"dropout": key}
        return model.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])

    (first, updates), (second, _) = (train(jax.random.key(seed)) for seed in (0, 1))
    old, new = variables["batch_stats"], updates["batch_stats"]
    for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert np.all(before != after)
    mean = _convolve(x, variables["params"]["stage1"]["conv1"]).mean((0, 1, 2))
    expected = 0.9 * old["stage1"]["norm1"]["mean"] + 0.1 * mean
    _assert_close(np.asarray(new["stage1"]["norm1"]["mean"]), expected)
    assert np.abs(first - second).max() > 1e-3


def test_dropout_follows_both_hidden_layers():
    x = _normal(0, 1, 32, 32, 3)
    model = vgg(**(TINY | {"fc_units": 400}))
    variables = _trained(model, x)
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
    rngs = {"dropout": jax.random.key(0)}
    _, inner = _apply(model, variables, x, train=True, rngs=rngs, **capture)
    for name in ("fc6", "fc7"):
        before = np.maximum(inner["intermediates"][name]["__call__"][0], 0)
        after = inner["intermediates"][f"dropout_{name}"]["__call__"][0]
        kept = after != 0
        assert kept[before > 0].mean() == pytest.approx(0.5, abs=0.1)
        np.testing.assert_allclose(after[kept], 2 * before[kept], rtol=1e-6)


def test_a_net_without_norms_has_no_statistics():
    x = jnp.zeros((1, 32, 32, 3))
    assert set(_trained(vgg(**TINY), x)) == {"params"}


@pytest.mark.long
def test_bfloat16_computes_in_bfloat16_and_keeps_the_rest_in_float32():
    x = _normal(0, 2, 32, 32, 3)
    model = vgg(**TINY, **BATCH, se_reduction=2, dtype=jnp.bfloat16).clone(stage_sizes=(1, 2))
    variables = _trained(model, x)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {"float32"}
    logits, inner = _apply(model, variables, x, train=False, capture_intermediates=True)
    assert logits.dtype == jnp.float32
    images = [y for y in jax.tree.leaves(inner) if y.ndim == 4]
    assert {str(y.dtype) for y in images} == {"bfloat16"}
    exact = _apply(model.clone(dtype=jnp.float32), variables, x, train=False)
    assert 1e-5 < np.abs(logits - exact).max() / np.abs(exact).max() < 0.05


# Checkpoints and scripts name parameters by these paths: a change here breaks them.
FROZEN = """
fc6/bias 6
fc6/kernel 392x6
fc7/bias 6
fc7/kernel 6x6
head/bias 5
head/kernel 6x5
stage1/conv1/bias 4
stage1/conv1/kernel 3x3x3x4
stage1/norm1/bias 4
stage1/norm1/scale 4
stage1/se1/excite/bias 4
stage1/se1/excite/kernel 2x4
stage1/se1/squeeze/bias 2
stage1/se1/squeeze/kernel 4x2
stage2/conv1/bias 8
stage2/conv1/kernel 3x3x4x8
stage2/norm1/bias 8
stage2/norm1/scale 8
stage2/se1/excite/bias 8
stage2/se1/excite/kernel 4x8
stage2/se1/squeeze/bias 4
stage2/se1/squeeze/kernel 8x4
"""


def test_parameter_paths_and_shapes_are_frozen():
    model = vgg(**TINY, **BATCH, se_reduction=2).clone(stage_sizes=(1, 1))
    params = _trained(model, jnp.zeros((1, 32, 32, 3)))["params"]
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): "x".join(map(str, leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert shapes == dict(line.split() for line in FROZEN.split("\n") if line)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ({"depth": 12}, "11, 13, 16, 19"),
        ({"norm": True}, "'batch', 'group', 'none'"),
        ({"kernel_init": "he"}, "'he_fan_out'"),
        ({"se_reduction": 65}, "at most 64"),
        ({"se_reduction": -1}, "0 .no gates"),
        ({"num_classes": 0}, "at least 1"),
        ({"dropout": 1.0}, "less than 1"),
    ],
)
def test_wrong_choices_are_told_what_would_be_right(arguments, right):
    with pytest.raises(ValueError, match=right) as caught:
        vgg(**arguments)
    assert next(iter(arguments)) in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "right"),
    [((1, 31, 64, 3), "at least 32"), ((32, 32, 3), r"\[N, H, W, C\]")],
)
def test_wrong_images_are_told_what_would_be_right(shape, right):
    with pytest.raises(ValueError, match=right) as caught:
        _trained(vgg(**TINY), jax.ShapeDtypeStruct(shape, jnp.float32))
    assert str(shape) in str(caught.value)
