"""Tests of AlexNet, of Network In Network, and of local response normalisation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import resflax
from resflax.models.alexnet import alexnet, alexnet_owt
from resflax.models.nin import cifar_nin
from resflax.ops.lrn import local_response_norm

# Compiling takes nearly all of the time here.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TINY = {"widths": (4, 6, 8, 8, 6), "fc_units": 10, "num_classes": 5}
TINY_NIN = {"widths": ((8, 6, 4), (8, 6, 8), (6, 8)), "num_classes": 5}


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _init(model, x):
    return jit(functools.partial(model.init, train=False))(jax.random.key(0, impl="rbg"), x)


def _trained(model, x):
    """Variables as after some training: no bias is zero. In numpy."""
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        if path[-1].key == "kernel":
            values = rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        else:
            values = rng.uniform(-0.1, 0.5, leaf.shape)
        return values.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def _apply(model, variables, x, **kwargs):
    out = jit(functools.partial(model.apply, **kwargs))(variables, x)
    return jax.tree.map(np.asarray, out)


def _assert_close(actual, expected, tolerance=1e-5):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


# --- local response normalisation ----------------------------------------------------------------


def _lrn(x, size, k, alpha, beta, divide):
    y = np.zeros(x.shape)
    channels = x.shape[-1]
    for c in range(channels):
        energy = np.zeros(x.shape[:-1])
        for j in range(max(0, c - size // 2), min(channels, c + size // 2 + 1)):
            energy += x[..., j].astype(np.float64) ** 2
        y[..., c] = x[..., c] / (k + (alpha / size if divide else alpha) * energy) ** beta
    return y


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize(
    ("channels", "size", "k", "alpha", "beta"),
    [(9, 5, 2.0, 1e-4, 0.75), (9, 5, 1.0, 0.5, 0.75), (3, 5, 1.0, 0.5, 0.5), (4, 1, 2.0, 1.0, 1.0)],
)
def test_lrn_is_its_definition(channels, size, k, alpha, beta, divide):
    x = 3 * _normal(0, 2, 3, 4, channels)
    norm = functools.partial(
        local_response_norm, size=size, k=k, alpha=alpha, beta=beta, divide=divide
    )
    actual = jit(norm)(x)
    assert actual.dtype == jnp.float32
    _assert_close(actual, _lrn(x, size, k, alpha, beta, divide))


def test_lrn_takes_the_constants_of_alexnet_if_none_are_given():
    x = 30 * _normal(0, 2, 2, 2, 8)
    _assert_close(jit(local_response_norm)(x), _lrn(x, 5, 2.0, 1e-4, 0.75, False))


def test_lrn_in_bfloat16_rounds_once():
    x = jnp.asarray(_normal(0, 2, 3, 4, 9), jnp.bfloat16)
    actual = jit(functools.partial(local_response_norm, k=1.0, alpha=0.5))(x)
    assert actual.dtype == jnp.bfloat16
    exact = _lrn(np.asarray(x, np.float32), 5, 1.0, 0.5, 0.75, False)
    np.testing.assert_allclose(np.asarray(actual, np.float32), exact, rtol=2**-8)


def test_lrn_has_the_gradient_of_finite_differences():
    x = jnp.asarray(_normal(0, 1, 2, 2, 6))
    norm = functools.partial(local_response_norm, k=1.0, alpha=0.5)
    weights, direction = jnp.asarray(_normal(1, *x.shape)), jnp.asarray(_normal(2, *x.shape))
    gradient = jit(jax.grad(lambda x: jnp.sum(weights * norm(x))))(x)
    ahead, behind = (jit(norm)(x + step * direction) for step in (1e-2, -1e-2))
    slope = float(jnp.sum(weights * (ahead - behind)) / 2e-2)
    assert float(jnp.sum(gradient * direction)) == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("size", [4, 0, -1])
def test_lrn_refuses_windows_without_a_middle(size):
    with pytest.raises(ValueError, match=f"size {size} must be odd"):
        local_response_norm(jnp.zeros((1, 2, 2, 8)), size)


# --- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "size", "params", "gmacs", "source"),
    [
        (alexnet(), 227, 60965224, 0.7244, "recomputed from the definition"),
        (alexnet(groups=1), 227, 62378344, 1.1353, "imgclsmob"),
        (alexnet_owt(), 224, 61100840, 0.7142, "torchvision 0.28 num_params and _ops"),
        (cifar_nin(), 32, 966986, 0.2225, "imgclsmob"),
        (cifar_nin(num_classes=100), 32, 984356, 0.2236, "imgclsmob"),
    ],
)
def test_counts_are_the_published_ones(model, size, params, gmacs, source):
    counted = resflax.count(model, (size, size, 3))
    assert counted.params == params
    assert counted.macs / 1e9 == pytest.approx(gmacs, rel=1e-3)
    assert counted.output_shape == (model.num_classes,)


def test_maps_shrink_as_published():
    parts = resflax.count(alexnet(), (227, 227, 3)).parts
    shapes = [parts[f"conv{i}"].output_shape for i in range(1, 6)]
    assert shapes == [(55, 55, 96), (27, 27, 256), *[(13, 13, c) for c in (384, 384, 256)]]
    parts = resflax.count(cifar_nin(), (32, 32, 3)).parts
    assert [parts[f"block{i}"].output_shape for i in (1, 2, 3)] == [
        (32, 32, 96),
        (16, 16, 192),
        (8, 8, 192),
    ]


# --- parity with plain forward passes ------------------------------------------------------------


def _convolve(x, params, stride=1, padding=None):
    kernel = params["kernel"]
    side = kernel.shape[0] // 2 if padding is None else padding
    y = lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(side, side), (side, side)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )
    return np.asarray(y) + params["bias"]


def _pool(x, reduce, *, ceil):
    """3x3/2 windows, one by one, of what lies in the image."""
    rows, columns = ((n - 3 + ceil) // 2 + 1 for n in x.shape[1:3])
    y = [
        [reduce(x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3], axis=(1, 2)) for j in range(columns)]
        for i in range(rows)
    ]
    return np.stack([np.stack(row, 1) for row in y], 1)


def _dense(x, params):
    return x @ params["kernel"] + params["bias"]


def _alexnet_forward(params, x, *, padding, lrn):
    for i in range(1, 6):
        stem = {"stride": 4, "padding": padding} if i == 1 else {}
        x = np.maximum(_convolve(x, params[f"conv{i}"], **stem), 0)
        if lrn and i <= 2:
            x = _lrn(x, 5, 2.0, 1e-4, 0.75, False).astype(np.float32)
        if i in (1, 2, 5):
            x = _pool(x, np.max, ceil=False)
    # One position is left, and stands for all 36 that fc6 reads.
    assert x.shape[1:3] == (1, 1)
    x = np.broadcast_to(x, (len(x), 6, 6, x.shape[-1])).reshape(len(x), -1)
    for name in ("fc6", "fc7"):
        x = np.maximum(_dense(x, params[name]), 0)
    return _dense(x, params["head"])


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("model", "size", "padding", "lrn"),
    [
        (alexnet(**TINY), (67, 70), 0, True),
        (alexnet(**TINY, groups=1), (70, 67), 0, True),
        (alexnet_owt(**TINY), (63, 94), 2, False),
    ],
)
def test_alexnet_logits_are_those_of_a_plain_forward_pass(model, size, padding, lrn):
    # Large enough that the normalisation is seen.
    x = 60 * _normal(0, 2, *size, 3)
    variables = _trained(model, x)
    expected = _alexnet_forward(variables["params"], x, padding=padding, lrn=lrn)
    _assert_close(_apply(model, variables, x, train=False), expected, 1e-4)


def _nin_forward(params, x):
    for block, reduce in (("block1", np.max), ("block2", np.mean), ("block3", None)):
        for conv in sorted(params[block]):
            x = np.maximum(_convolve(x, params[block][conv]), 0)
        x = x if reduce is None else _pool(x, reduce, ceil=True)
    return np.maximum(_convolve(x, params["head"]["conv"]), 0).mean((1, 2))


@pytest.mark.first(1)
@pytest.mark.parametrize("size", [(8, 11), (10, 13), (4, 5)])
def test_nin_logits_are_those_of_a_plain_forward_pass(size):
    x = _normal(0, 2, *size, 3)
    model = cifar_nin(**TINY_NIN)
    variables = _trained(model, x)
    # Few of the maps are cut off by the last ReLU.
    head = variables["params"]["head"]["conv"]
    head["kernel"] *= 0.1
    head["bias"][:] = 0.2, 0.3, -0.1, 0.4, 0.5
    expected = _nin_forward(variables["params"], x)
    assert np.count_nonzero(expected) >= 6
    _assert_close(_apply(model, variables, x, train=False), expected, 1e-4)


# --- modes ---------------------------------------------------------------------------------------

MODELS = [(alexnet(**TINY), 67), (cifar_nin(**TINY_NIN), 8)]


@pytest.mark.long
@pytest.mark.parametrize(("model", "size"), MODELS)
def test_training_drops_units_and_reaches_every_parameter(model, size):
    x = _normal(0, 8, size, size, 3)
    variables = _trained(model, x)
    assert set(variables) == {"params"}

    @jit
    def step(params, key):
        def loss(params):
            rngs = {"dropout": key}
            logits = model.apply({"params": params}, x, train=True, rngs=rngs)
            return jnp.sum(logits * _normal(1, *logits.shape)), logits

        return jax.grad(loss, has_aux=True)(params)

    (grads, first), (_, second) = (step(variables["params"], jax.random.key(i)) for i in (0, 1))
    assert np.abs(first - second).max() > 1e-3
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(grad).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("model", "size", "order"),
    [
        (alexnet(**TINY), 67, "fc6 dropout_fc7 fc7 dropout_head head"),
        (alexnet_owt(**TINY), 63, "dropout_fc6 fc6 dropout_fc7 fc7 head"),
        (cifar_nin(**TINY_NIN), 8, "dropout1 dropout2"),
    ],
)
def test_dropout_stands_where_it_was_published(model, size, order):
    seen = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout | nn.Dense):
            seen.append(context.module.name)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        _trained(model, jnp.zeros((1, size, size, 3)))
    assert seen == order.split()
    assert model.dropout == 0.5


@pytest.mark.first(1)
@pytest.mark.parametrize(("model", "size"), MODELS)
def test_bfloat16_computes_in_bfloat16_and_keeps_the_rest_in_float32(model, size):
    x = _normal(0, 2, size, size, 3)
    variables = _trained(model, x)
    low = model.clone(dtype=jnp.bfloat16)
    logits, inner = _apply(low, variables, x, train=False, capture_intermediates=True)
    assert logits.dtype == jnp.float32
    images = [y for y in jax.tree.leaves(inner) if y.ndim == 4]
    assert {str(y.dtype) for y in images} == {"bfloat16"}
    exact = _apply(model, variables, x, train=False)
    assert 1e-5 < np.abs(logits - exact).max() / np.abs(exact).max() < 0.05


@pytest.mark.long
def test_alexnet_starts_as_published():
    params = _init(alexnet(**(TINY | {"fc_units": 64})), jnp.zeros((1, 67, 67, 3)))["params"]
    for name, layer in params.items():
        assert np.std(layer["kernel"]) == pytest.approx(0.01, rel=0.15), name
        one = name in ("conv2", "conv4", "conv5", "fc6", "fc7")
        np.testing.assert_array_equal(layer["bias"], float(one), err_msg=name)


def test_other_starts_are_overrides():
    params = _init(alexnet_owt(**TINY, bias=0.1), jnp.zeros((1, 63, 63, 3)))["params"]
    kernel = params["fc6"]["kernel"]
    assert np.abs(kernel).max() == pytest.approx(1 / np.sqrt(kernel.shape[0]), rel=0.05)
    np.testing.assert_allclose(params["conv4"]["bias"], 0.1)
    np.testing.assert_array_equal(params["conv3"]["bias"], 0)
    assert alexnet_owt().bias == 0


# Checkpoints and scripts name parameters by these paths: a change here breaks them.
FROZEN = """
conv1/bias 4
conv1/kernel 11x11x3x4
conv2/bias 6
conv2/kernel 5x5x2x6
conv3/bias 8
conv3/kernel 3x3x6x8
conv4/bias 8
conv4/kernel 3x3x4x8
conv5/bias 6
conv5/kernel 3x3x4x6
fc6/bias 10
fc6/kernel 216x10
fc7/bias 10
fc7/kernel 10x10
head/bias 5
head/kernel 10x5
"""

FROZEN_NIN = """
block1/conv1/bias 8
block1/conv1/kernel 5x5x3x8
block1/conv2/bias 6
block1/conv2/kernel 1x1x8x6
block1/conv3/bias 4
block1/conv3/kernel 1x1x6x4
block2/conv1/bias 8
block2/conv1/kernel 5x5x4x8
block2/conv2/bias 6
block2/conv2/kernel 1x1x8x6
block2/conv3/bias 8
block2/conv3/kernel 1x1x6x8
block3/conv1/bias 6
block3/conv1/kernel 3x3x8x6
block3/conv2/bias 8
block3/conv2/kernel 1x1x6x8
head/conv/bias 5
head/conv/kernel 1x1x8x5
"""


@pytest.mark.parametrize(
    ("model", "frozen"), [(alexnet(**TINY), FROZEN), (cifar_nin(**TINY_NIN), FROZEN_NIN)]
)
def test_parameter_paths_and_shapes_are_frozen(model, frozen):
    params = _trained(model, jnp.zeros((1, 67, 67, 3)))["params"]
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): "x".join(map(str, leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert shapes == dict(line.split() for line in frozen.split("\n") if line)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "arguments", "right"),
    [
        (alexnet, {"groups": 5}, "1, 2, 4, 8, 16, 32.$"),
        (alexnet, {"groups": 0}, "at least 1"),
        (alexnet, {"widths": (8, 8)}, "five numbers"),
        (alexnet, {"stem_padding": 6}, "0 to 5"),
        (alexnet, {"dropout": 1.0}, "less than 1"),
        (alexnet, {"dropped": ("fc8",)}, "'fc6', 'fc7', 'head'"),
        (alexnet_owt, {"kernel_init": "he"}, "'gaussian', .*'torch_uniform'"),
        (alexnet_owt, {"num_classes": 0}, "at least 1"),
        (cifar_nin, {"widths": ((8,), (8,))}, "three lists"),
        (cifar_nin, {"widths": ((8,), (8,), ())}, "three lists"),
        (cifar_nin, {"widths": (8, 8, 8)}, "three lists"),
        (cifar_nin, {"widths": ((8,), (8,), ("x",))}, "three lists"),
        (cifar_nin, {"num_classes": 0}, "at least 1"),
        (cifar_nin, {"dropout": 1.0}, "less than 1"),
    ],
)
def test_wrong_choices_are_told_what_would_be_right(build, arguments, right):
    with pytest.raises(ValueError, match=right) as caught:
        build(**arguments)
    assert next(iter(arguments)) in str(caught.value)


@pytest.mark.parametrize(
    ("build", "shape", "right"),
    [
        (alexnet, (1, 66, 227, 3), "at least 67"),
        (alexnet_owt, (1, 224, 62, 3), "at least 63"),
        (alexnet, (227, 227, 3), r"\[N, H, W, C\]"),
        (cifar_nin, (1, 3, 32, 3), "at least 4"),
        (cifar_nin, (32, 32, 3), r"\[N, H, W, C\]"),
    ],
)
def test_wrong_images_are_told_what_would_be_right(build, shape, right):
    with pytest.raises(ValueError, match=right) as caught:
        _trained(build(), jax.ShapeDtypeStruct(shape, jnp.float32))
    assert str(shape) in str(caught.value)
