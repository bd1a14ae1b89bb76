"""Tests of DenseNet: published counts and a closed form, parity with a plain forward pass."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import resflax
from resflax.models import layers
from resflax.models.densenet import IMAGENET_DEPTHS, cifar_densenet, densenet

# Compiling takes nearly all of the time here.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TINY = {"depth": 10, "growth_rate": 4, "num_classes": 5}


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


def _closed_form(sizes, k, *, stem, classes, bottleneck=True, theta=0.5, imagenet=False):
    """(parameters, MACs), by sums over whole blocks: Section 3 and Table 1 of the paper."""
    pixels = 112**2 if imagenet else 32**2
    params = (49 if imagenet else 9) * 3 * stem
    macs = params * pixels
    if imagenet:
        params, pixels = params + 2 * stem, 56**2
    m = stem
    for i, n in enumerate(sizes):
        inputs = n * m + k * n * (n - 1) // 2  # channels that the block's layers read, together
        weights = 4 * k * inputs + n * 9 * 4 * k * k if bottleneck else 9 * k * inputs
        norms = 2 * (inputs + n * 4 * k) if bottleneck else 2 * inputs
        params, macs, m = params + weights + norms, macs + weights * pixels, m + n * k
        if i + 1 < len(sizes):
            kept = int(theta * m)
            params, macs = params + m * kept + 2 * m, macs + m * kept * pixels
            m, pixels = kept, pixels // 4
    return params + 2 * m + (m + 1) * classes, macs + m * classes


def _imagenet_form(depth, k=32):
    sizes = IMAGENET_DEPTHS[depth]
    return functools.partial(_closed_form, sizes, k, stem=2 * k, classes=1000, imagenet=True)


def _cifar_form(depth, k, bottleneck):
    size = (depth - 4) // (6 if bottleneck else 3)
    stem, theta = (2 * k, 0.5) if bottleneck else (16, 1)
    return functools.partial(
        _closed_form, (size,) * 3, k, stem=stem, classes=10, bottleneck=bottleneck, theta=theta
    )


# (constructor's arguments, parameters, 10^9 MACs, where the numbers are from)
TORCHVISION = "torchvision 0.28 num_params and _ops"
RECOMPUTED = "recomputed from the definition"
DERIVED = "the closed form above"
IMAGENET = [
    ((121,), 7978856, 2.8342, TORCHVISION),
    ((169,), 14149480, 3.3598, TORCHVISION),
    ((201,), 20013928, 4.2914, TORCHVISION),
    ((161, 48), 28681000, 7.7279, TORCHVISION),
    ((264,), 33337704, 5.7517, DERIVED),
    ((264, 48), 72686632, 12.8507, RECOMPUTED),
]
CIFAR = [
    ((40, 12, False), 1019722, 0.2648, RECOMPUTED),
    ((100, 12, False), 6979642, 1.7695, RECOMPUTED),
    ((100, 24, False), 27249082, 6.8893, DERIVED),
    ((100, 12, True), 769162, 0.2879, RECOMPUTED),
    ((250, 24, True), 15324406, 5.4188, DERIVED),
    ((190, 40, True), 25624430, 9.3019, RECOMPUTED),
    ((40, 36, True), 1542682, 0.6473, RECOMPUTED),
    ((40, 48, True), 2733130, 1.1499, RECOMPUTED),
    ((40, 60, True), 4261690, 1.7958, RECOMPUTED),
]
QUICK = [(121,), (40, 12, False), (100, 12, True), (40, 36, True)]


def _rows(*, marked):
    for rows, build, form, size in (
        (IMAGENET, densenet, _imagenet_form, 224),
        (CIFAR, cifar_densenet, _cifar_form, 32),
    ):
        for arguments, params, gmacs, _ in rows:
            # The deep ones take seconds to trace and repeat the shallow ones.
            marks = pytest.mark.slow if marked and arguments not in QUICK else ()
            yield pytest.param(build, form, size, arguments, params, gmacs, marks=marks)


ROW = ("build", "form", "size", "arguments", "params", "gmacs")


@pytest.mark.long
@pytest.mark.parametrize(ROW, list(_rows(marked=True)))
def test_counts_are_the_published_ones(build, form, size, arguments, params, gmacs):
    counted = resflax.count(build(*arguments), (size, size, 3))
    assert counted.params == params
    assert counted.macs / 1e9 == pytest.approx(gmacs, rel=1e-3, abs=5e-5)
    assert (counted.params, counted.macs) == form(*arguments)()


@pytest.mark.parametrize(ROW, list(_rows(marked=False)))
def test_the_closed_form_gives_every_published_count(build, form, size, arguments, params, gmacs):
    expected, macs = form(*arguments)()
    assert expected == params
    assert macs / 1e9 == pytest.approx(gmacs, rel=1e-3, abs=5e-5)


@pytest.mark.slow
def test_the_network_of_232_layers_has_the_count_of_its_inferred_blocks():
    # Unnamed: its blocks are inferred from its depth and the size of its weights' file.
    sizes = (6, 12, 48, 48)
    model = densenet(264, 48).clone(stage_sizes=sizes)
    counted = resflax.count(model, (224, 224, 3))
    assert (counted.params, round(counted.macs / 1e9, 4)) == (55570984, 10.1191)
    expected = _closed_form(sizes, 48, stem=96, classes=1000, imagenet=True)
    assert (counted.params, counted.macs) == expected


@pytest.mark.long
@pytest.mark.parametrize(
    ("overrides", "difference"),
    [
        ({"stem_filters": 24}, 1059298 - 1019722),  # the released densenet.lua: 2k everywhere
        ({"stem_filters": 24, "compression": 0.5}, 599050 - 1019722),  # imgclsmob's of this name
    ],
)
def test_other_codes_networks_are_overrides(overrides, difference):
    counted = resflax.count(cifar_densenet(40, 12, **overrides), (32, 32, 3))
    assert counted.params - 1019722 == difference


# --- parity with a plain forward pass ------------------------------------------------------------


def _convolve(x, params, stride=1):
    kernel = params["kernel"]
    side = kernel.shape[0] // 2
    pads = [(side, side), (side, side)]
    dimensions = ("NHWC", "HWIO", "NHWC")
    return np.asarray(
        lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=dimensions)
    )


def _act(x, variables, *path):
    params, stats = variables["params"], variables["batch_stats"]
    for name in path:
        params, stats = params[name], stats[name]
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    return np.maximum(x * params["scale"] + params["bias"], 0)


def _max_pool(x):
    x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-np.inf)
    rows, columns = ((n - 3) // 2 + 1 for n in x.shape[1:3])
    parts = [
        x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    return np.max(parts, axis=0)


def _halve(x):
    rows, columns = (n // 2 * 2 for n in x.shape[1:3])
    return sum(x[:, i:rows:2, j:columns:2] for i in (0, 1) for j in (0, 1)) / 4


def _forward(variables, x, stage_sizes):
    """Eval mode; the bottleneck and the stem's norm stand where the parameters have them."""
    params = variables["params"]
    if "norm" in params["stem"]:
        x = _convolve(x, params["stem"]["conv"], 2)
        x = _max_pool(_act(x, variables, "stem", "norm"))
    else:
        x = _convolve(x, params["stem"]["conv"])
    for block, size in enumerate(stage_sizes, 1):
        if block > 1:
            name = f"transition{block - 1}"
            x = _halve(_convolve(_act(x, variables, name, "norm"), params[name]["conv"]))
        for i in range(1, size + 1):
            y, name = x, f"block{block}_layer{i}"
            for j in range(1, 1 + sum(part.startswith("conv") for part in params[name])):
                y = _convolve(_act(y, variables, name, f"norm{j}"), params[name][f"conv{j}"])
            x = np.concatenate([x, y], -1)
    x = _act(x, variables, "norm").mean((1, 2))
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("arguments", "stage_sizes", "size"),
    [
        (TINY, (2, 2, 2), (8, 11)),
        (TINY | {"depth": 16, "bottleneck": True}, (2, 2, 2), (9, 8)),
        (TINY | {"bottleneck": True, "stem": "imagenet"}, (1, 1, 1), (65, 72)),
    ],
)
def test_logits_are_those_of_a_plain_forward_pass(arguments, stage_sizes, size):
    x = _normal(0, 2, *size, 3)
    model = cifar_densenet(**arguments)
    variables = _trained(model, x)
    expected = _forward(variables, x, stage_sizes)
    _assert_close(_apply(model, variables, x, train=False), expected, 1e-4)


# --- modes ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_training_alone_updates_the_statistics():
    x = 1 + _normal(0, 4, 8, 8, 3)
    model = cifar_densenet(**TINY, bottleneck=True, bn_momentum=0.75)
    variables = _trained(model, x)

    def statistics(train):
        _, updates = _apply(model, variables, x, train=train, mutable=["batch_stats"])
        return updates["batch_stats"]

    old = variables["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, statistics(False), old)
    trained = statistics(True)
    for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(trained), strict=True):
        assert np.all(before != after)
    mean = _convolve(x, variables["params"]["stem"]["conv"]).mean((0, 1, 2))
    before, after = (stats["block1_layer1"]["norm1"]["mean"] for stats in (old, trained))
    _assert_close(after, 0.75 * before + 0.25 * mean)


def test_dropout_follows_every_convolution_but_the_first():
    x = _normal(0, 2, 8, 8, 3)
    model = cifar_densenet(**TINY, bottleneck=True, dropout=0.2)
    order, rates = [], set()

    def record(call, args, kwargs, context):
        module = context.module
        if isinstance(module, nn.Dropout | layers.Conv):
            order.append("/".join(module.path))
        if isinstance(module, nn.Dropout):
            rates.add((module.rate, module.deterministic))
        return call(*args, **kwargs)

    variables = _trained(model, x)
    for train in (True, False):
        order.clear()
        rates.clear()
        apply = functools.partial(model.apply, train=train, mutable=["batch_stats"])
        with nn.intercept_methods(record):
            jax.eval_shape(apply, variables, x, rngs={"dropout": jax.random.key(0)})
        assert rates == {(0.2, not train)}
        assert order[0] == "stem/conv"
        assert len(order) == 1 + 2 * (3 * 2 + 2)
        assert order[2::2] == [path.replace("conv", "dropout") for path in order[1::2]]


def test_bfloat16_computes_in_bfloat16_and_keeps_the_rest_in_float32():
    x = _normal(0, 2, 8, 8, 3)
    model = cifar_densenet(**TINY, bottleneck=True, dtype=jnp.bfloat16)
    variables = _trained(model, x)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {"float32"}
    logits, inner = _apply(model, variables, x, train=False, capture_intermediates=True)
    assert logits.dtype == jnp.float32
    images = [y for y in jax.tree.leaves(inner) if y.ndim == 4]
    assert {str(y.dtype) for y in images} == {"bfloat16"}
    exact = _apply(model.clone(dtype=jnp.float32), variables, x, train=False)
    assert 1e-5 < np.abs(logits - exact).max() / np.abs(exact).max() < 0.05


def test_kernels_start_with_the_variance_of_their_fan_in():
    model = cifar_densenet(10, 32, bottleneck=True).clone(stage_sizes=(1,))
    x, key = jnp.zeros((1, 4, 4, 3)), jax.random.key(0, impl="rbg")
    params = jit(functools.partial(model.init, train=False))(key, x)["params"]
    for name, fan_in in (("conv1", 64), ("conv2", 9 * 128)):
        kernel = params["block1_layer1"][name]["kernel"]
        assert np.std(kernel) == pytest.approx(np.sqrt(2 / fan_in), rel=0.05)


# Checkpoints and scripts name parameters by these paths: a change here breaks them.
FROZEN = """
block1_layer1/conv1/kernel 1x1x10x20
block1_layer1/conv2/kernel 3x3x20x5
block1_layer1/norm1/bias 10
block1_layer1/norm1/scale 10
block1_layer1/norm2/bias 20
block1_layer1/norm2/scale 20
block2_layer1/conv1/kernel 1x1x7x20
block2_layer1/conv2/kernel 3x3x20x5
block2_layer1/norm1/bias 7
block2_layer1/norm1/scale 7
block2_layer1/norm2/bias 20
block2_layer1/norm2/scale 20
block3_layer1/conv1/kernel 1x1x6x20
block3_layer1/conv2/kernel 3x3x20x5
block3_layer1/norm1/bias 6
block3_layer1/norm1/scale 6
block3_layer1/norm2/bias 20
block3_layer1/norm2/scale 20
head/bias 3
head/kernel 11x3
norm/bias 11
norm/scale 11
stem/conv/kernel 7x7x3x10
stem/norm/bias 10
stem/norm/scale 10
transition1/conv/kernel 1x1x15x7
transition1/norm/bias 15
transition1/norm/scale 15
transition2/conv/kernel 1x1x12x6
transition2/norm/bias 12
transition2/norm/scale 12
"""


def test_parameter_paths_and_shapes_are_frozen():
    # Half of an odd number of channels is rounded down.
    model = cifar_densenet(10, 5, True, stem="imagenet", num_classes=3, any_size=True)
    params = _trained(model, jnp.zeros((1, 16, 16, 3)))["params"]
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): "x".join(map(str, leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert shapes == dict(line.split() for line in FROZEN.split("\n") if line)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "arguments", "right"),
    [
        (densenet, {"depth": 122}, "121, 161, 169, 201, 264"),
        (cifar_densenet, {"depth": 41}, r"3n \+ 4.* 7, 10, .*40"),
        (
            cifar_densenet,
            {"depth": 43, "bottleneck": True},
            r"6n \+ 4.*=True.* 10, 16, .*40, .*100",
        ),
        (cifar_densenet, {"depth": 4}, " 7, 10"),
        (densenet, {"stem": "deep"}, "'imagenet', 'cifar'"),
        (densenet, {"norm": "layer"}, "'batch', 'group', 'none'"),
        (densenet, {"kernel_init": "he"}, "'he_fan_in'"),
        (densenet, {"growth_rate": 0}, "at least 1"),
        (densenet, {"num_classes": 0}, "at least 1"),
        (densenet, {"dropout": 1.0}, "less than 1"),
        (densenet, {"compression": 1.5}, "at most 1"),
        (densenet, {"compression": 0.001}, "without channels"),
    ],
)
def test_wrong_choices_are_told_what_would_be_right(build, arguments, right):
    with pytest.raises(ValueError, match=right) as caught:
        build(**arguments)
    assert next(iter(arguments)) in str(caught.value)


@pytest.mark.parametrize(
    ("build", "shape", "right"),
    [
        (densenet, (1, 31, 64, 3), "at least 32"),
        (cifar_densenet, (1, 8, 3, 3), "at least 4"),
        (cifar_densenet, (32, 32, 3), r"\[N, H, W, C\]"),
    ],
)
def test_wrong_images_are_told_what_would_be_right(build, shape, right):
    with pytest.raises(ValueError, match=right) as caught:
        _trained(build(), jax.ShapeDtypeStruct(shape, jnp.float32))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize(
    ("stem", "side", "right"),
    [("imagenet", 63, "stem='cifar' is for up to 128"), ("cifar", 129, "'imagenet' is for 64")],
)
def test_images_of_sizes_unusual_for_the_stem_must_be_meant(stem, side, right):
    with pytest.raises(ValueError, match=right):
        resflax.count(cifar_densenet(7, 4, stem=stem), (side, side, 3))
    meant = cifar_densenet(7, 4, stem=stem, any_size=True)
    assert resflax.count(meant, (side, side, 3)).output_shape == (10,)


def test_the_smallest_images_fit():
    assert resflax.count(
        cifar_densenet(7, 4, stem="imagenet", num_classes=7, any_size=True), (16, 16, 3)
    ).output_shape == (7,)
    assert resflax.count(cifar_densenet(7, 12), (4, 4, 3)).output_shape == (10,)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_other_norms_have_no_statistics(norm):
    x = _normal(0, 2, 8, 8, 3)
    model = cifar_densenet(7, 4, norm=norm)
    variables = _trained(model, x)
    assert set(variables) == {"params"}
    assert ("bias" in variables["params"]["stem"]["conv"]) is (norm == "none")
    assert np.all(np.isfinite(_apply(model, variables, x, train=True)))
