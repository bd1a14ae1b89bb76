"""Tests of batch norm and what follows it, in one pass, against Flax's own, step by step."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import resflax
from resflax.models import gates, layers
from resflax.ops import norm

# Odd sizes, and channels that fill no register.
SHAPES = [(3, 5, 7, 12), (4, 3, 2, 17), (1, 4, 4, 3)]
# Channels that the compiled kernels are for, in float32.
SIXTEEN = (3, 5, 7, 16)


class Fused(nn.Module):
    """norm, gate, addition, ReLU as the networks have them."""

    train: bool
    gate: bool
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, residual=None):
        y = layers.BatchNorm(
            not self.train, 0.7, 1e-3, self.axis_name, dtype=self.dtype, name="norm"
        )(x)
        if self.gate:
            y = gates.SqueezeExcite(3, name="se")(y)
            assert isinstance(y, norm.Affine)
        return norm.relu(y if residual is None else norm.add(residual, y))


class Plain(nn.Module):
    """The same of flax.linen and jax.numpy, with the same names."""

    train: bool
    gate: bool
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, residual=None):
        y = nn.BatchNorm(not self.train, -1, 0.7, 1e-3, axis_name=self.axis_name, name="norm")(x)
        if self.gate:
            y = gates.SqueezeExcite(3, name="se")(y)
            assert isinstance(y, jax.Array)
        return jnp.maximum(y if residual is None else y + residual, 0)


def _normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _images(shape, seed=0, dtype=jnp.float32):
    """Each channel has a deviation of its own, and a mean of three of them, of either sign."""
    rng = np.random.default_rng(seed)
    deviation = rng.uniform(0.1, 10, shape[-1]) * rng.choice([-1, 1], shape[-1])
    return jnp.asarray(rng.normal(3, 1, shape) * deviation, dtype)


def _variables(shape):
    """Of both modules, none of them at its initial value."""
    variables = Fused(True, True).init(jax.random.key(0), jnp.zeros(shape))
    leaves, tree = jax.tree.flatten(variables["params"])
    params = [leaf + 0.5 * _normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
    x = _images(shape, seed=1).astype(jnp.float32)
    stats = {"norm": {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2)) + 0.1}}
    return jax.tree.unflatten(tree, params), stats


def _jit(fn):
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def _value_and_grads(module, x, residual):
    """The result, the running statistics and all gradients, as one dict."""
    params, stats = _variables(x.shape)
    arguments = {"params": params, "x": x} | ({} if residual is None else {"residual": residual})

    @_jit
    def run(arguments):
        def apply(arguments):
            arguments = dict(arguments)
            variables = {"params": arguments.pop("params"), "batch_stats": stats}
            return module.apply(variables, **arguments, mutable=["batch_stats"])

        y, pull, updated = jax.vjp(apply, arguments, has_aux=True)
        return {"y": y, "grads": pull(_normal(5, *y.shape, dtype=y.dtype))[0], **updated}

    return run(arguments)


def _assert_close(actual, expected, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        limit = tolerance * np.abs(e).max()
        np.testing.assert_allclose(a, e, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))


# Each two of the four together.
@pytest.mark.first(2)
@pytest.mark.devices(1, 8)
@pytest.mark.parametrize(
    ("shape", "gate", "added", "train"),
    [
        (SHAPES[0], False, False, True),
        (SHAPES[0], True, True, False),
        (SHAPES[1], False, True, False),
        (SHAPES[1], True, False, True),
        (SHAPES[2], False, True, True),
        (SHAPES[2], True, False, False),
    ],
)
def test_one_pass_agrees_with_flax_step_by_step(shape, gate, added, train):
    x, residual = _images(shape), _normal(2, *shape) if added else None
    actual = _value_and_grads(Fused(train, gate), x, residual)
    expected = _value_and_grads(Plain(train, gate), x, residual)
    assert expected["batch_stats"].keys() == {"norm"}
    # Both round; the images' gradients are differences of greater numbers.
    _assert_close(actual, expected, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gate", [False, True], ids=["", "gate"])
def test_bfloat16_agrees_with_float32_within_its_rounding(gate, train):
    x, residual = _images(SIXTEEN, dtype=jnp.bfloat16), _normal(2, *SIXTEEN, dtype=jnp.bfloat16)
    actual = _value_and_grads(Fused(train, gate, dtype=jnp.bfloat16), x, residual)
    grads = actual["grads"]
    assert actual["y"].dtype == grads["x"].dtype == grads["residual"].dtype == jnp.bfloat16
    full = (a.astype(jnp.float32) for a in (x, residual))
    expected = _value_and_grads(Plain(train, gate), *full)
    # Statistics, gates and the sums over the images are of float32.
    _assert_close(actual.pop("batch_stats"), expected.pop("batch_stats"), 1e-5)
    _assert_close(actual, expected, 2**-7)


def test_the_result_of_bfloat16_is_rounded_once():
    x, residual = _images(SHAPES[0], dtype=jnp.bfloat16), _normal(2, *SHAPES[0], dtype=jnp.bfloat16)
    scale, shift = 0.3 + jnp.abs(_normal(3, 1, 12)), _normal(4, 1, 12)
    y = norm.relu(norm.Affine(x, scale, shift, residual=residual))
    full = (a.astype(jnp.float32) for a in (x, residual))
    images, addend = full
    exact = images * scale[:, None, None] + shift[:, None, None] + addend
    np.testing.assert_array_equal(y, jnp.maximum(exact, 0).astype(jnp.bfloat16))


@pytest.mark.first(2)
@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("channels", "gate", "checked"),
    [(6, False, False), (6, True, True), (32, False, True), (32, True, False)],
)
def test_the_whole_batch_on_eight_devices(channels, gate, checked):
    shape = (16, 3, 5, channels)
    x, residual = _images(shape), _normal(2, *shape)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    class Mapped(Fused):
        def apply(self, variables, x, residual, *, mutable):
            apply = functools.partial(super().apply, mutable=mutable)
            specs = P(), P("data"), P("data")
            mapped = jax.shard_map(
                apply, mesh=mesh, in_specs=specs, out_specs=(P("data"), P()), check_vma=checked
            )
            return mapped(variables, x, residual)

    actual = _value_and_grads(Mapped(True, gate, "data"), x, residual)
    _assert_close(actual, _value_and_grads(Plain(True, gate), x, residual), 1e-5)


@pytest.mark.long
def test_without_an_axis_each_device_has_statistics_of_its_own():
    x = _images((2, 3, 5, 6))
    module = layers.BatchNorm(False)
    variables = module.init(jax.random.key(0), x)

    def apply(module, x):
        return norm.value(module.apply(variables, x, mutable=["batch_stats"])[0])

    alone = jax.vmap(functools.partial(apply, module))(x[:, None])
    np.testing.assert_array_equal(alone[:, 0], [apply(module, row[None])[0] for row in x])
    together = jax.vmap(
        functools.partial(apply, layers.BatchNorm(False, axis_name="i")), axis_name="i"
    )(x[:, None])
    _assert_close(together[:, 0], apply(module, x), 1e-5)


def test_no_statistics_move_while_variables_are_made():
    # Nor is the axis bound then.
    variables = layers.BatchNorm(False, axis_name="i").init(jax.random.key(0), _images(SHAPES[0]))
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(12))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(12))


def test_a_constant_channel_has_no_negative_variance():
    # Rounding leaves a difference of either sign of the mean of the squares and that of the mean.
    x = jnp.broadcast_to(300 + jnp.arange(64) / 7, (3, 33, 31, 64))
    module = layers.BatchNorm(False)
    y, stats = module.apply(module.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    assert np.all(stats["batch_stats"]["var"] >= np.float32(0.9))
    assert np.isfinite(norm.value(y)).all()


# --- the parts of an Affine ----------------------------------------------------------------------


def _affine(shape=SHAPES[0], **fields):
    x, scale, shift = _images(shape), _normal(1, 1, shape[-1]), _normal(2, 1, shape[-1])
    return norm.Affine(x, scale, shift)._replace(**fields)


def _exact(y):
    """In float64, by its definition."""
    wide = functools.partial(np.asarray, dtype=np.float64)
    value = wide(y.x) * wide(y.scale)[:, None, None] + wide(y.shift)[:, None, None]
    return value if y.residual is None else value + wide(y.residual)


@pytest.mark.parametrize("activation", layers.ACTIVATIONS)
@pytest.mark.parametrize("residual", [None, _normal(3, *SHAPES[0])], ids=["", "residual"])
def test_every_activation_is_of_the_value(activation, residual):
    y = _affine(residual=residual)
    plain = {
        "relu": lambda y: np.maximum(y, 0),
        "sigmoid": lambda y: 1 / (1 + np.exp(-y)),
        "tanh": np.tanh,
        "leaky_relu": lambda y: np.where(y > 0, y, 0.01 * y),
        "silu": lambda y: y / (1 + np.exp(-y)),
    }[activation]
    act = layers.ACTIVATIONS[activation]
    _assert_close(act(y), plain(_exact(y)), 1e-5)
    value = norm.value(y)
    _assert_close(value, _exact(y), 1e-5)
    np.testing.assert_allclose(act(y), act(value), rtol=1e-6)

    def grads(form):
        return jax.grad(lambda y: jnp.sum(act(form(y)) * _normal(4, *y.x.shape)))(y)

    def unfused(y):
        x = y.x * y.scale[:, None, None] + y.shift[:, None, None]
        return x if y.residual is None else x + y.residual

    _assert_close(grads(lambda y: y), grads(unfused), 1e-5)


def test_the_gradient_of_a_relu_at_zero_is_zero():
    zeros = jnp.zeros((1, 1, 1, 2))
    y = norm.Affine(zeros, jnp.ones((1, 2)), jnp.zeros((1, 2)), residual=zeros)
    grads = jax.grad(lambda y: jnp.sum(norm.relu(y)))(y)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_what_is_not_a_number_stays_so():
    y = _affine()
    y = y._replace(x=y.x.at[0, 0, 0, 0].set(jnp.nan))
    nans = np.isnan(norm.relu(y))
    assert nans[0, 0, 0, 0]
    assert nans.sum() == 1


def test_a_sum_stays_uncomputed_once():
    y, other = _affine(), _affine(scale=2 + _normal(6, 1, 12))
    array = _normal(7, *SHAPES[0])
    once = norm.add(array, y)
    assert isinstance(once, norm.Affine)
    assert isinstance(norm.add(other, y), norm.Affine)
    _assert_close(norm.value(once), _exact(y) + array, 1e-5)
    _assert_close(norm.value(norm.add(other, y)), _exact(other) + _exact(y), 1e-5)
    # There is room for one addend only.
    _assert_close(norm.value(norm.add(other, once)), _exact(other) + _exact(y) + array, 1e-5)
    _assert_close(norm.value(norm.add(y, array)), _exact(y) + array, 1e-5)
    _assert_close(norm.value(norm.add(array, array)), array + array, 1e-6)


def test_the_means_of_a_squeeze_come_from_the_statistics():
    x = _images(SHAPES[0])
    same, means, squares = norm.moments(x)
    np.testing.assert_array_equal(same, x)
    _assert_close(means, x.mean((1, 2)), 1e-6)
    _assert_close(squares, (x**2).mean((1, 2)), 1e-6)
    y = _affine()
    expected = _exact(y).mean((1, 2))
    _assert_close(y.pooled(), expected, 1e-5)  # of the images, where the means are not known
    _assert_close(y._replace(x=jnp.full_like(x, jnp.nan), mean=means).pooled(), expected, 1e-5)
    gates = _normal(8, 3, 12)
    _assert_close(norm.value(y.gated(gates)), _exact(y) * gates[:, None, None], 1e-5)


@pytest.mark.parametrize("squeeze", ["avg", "max", "none"])
@pytest.mark.parametrize("residual", [None, _normal(3, *SHAPES[0])], ids=["", "residual"])
def test_a_gate_of_what_is_yet_to_be_computed_is_one_of_its_value(squeeze, residual):
    y = _affine(residual=residual)
    layer = gates.SqueezeExcite(3, squeeze, "tanh")
    variables = layer.init(jax.random.key(0), y)
    gated = layer.apply(variables, y)
    assert isinstance(gated, norm.Affine) == (squeeze == "avg" and residual is None)
    _assert_close(norm.value(gated), layer.apply(variables, norm.value(y)), 1e-5)


# --- what is kept, and what is seen --------------------------------------------------------------


class Block(nn.Module):
    """A convolution, norm, gate, addition and ReLU."""

    filters: int
    gate: bool = False
    added: bool = False
    next_size: int = 3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train):
        y = layers.Conv(self.filters, 3, dtype=self.dtype, name="conv")(x)
        y = layers.BatchNorm(not train, dtype=self.dtype, name="norm")(y)
        if self.gate:
            y = gates.SqueezeExcite(4, dtype=self.dtype, name="se")(y)
        if self.added:
            y = norm.add(jnp.repeat(x, self.filters // 3, axis=-1).astype(self.dtype), y)
        y = norm.relu(y)
        return layers.Conv(5, self.next_size, dtype=self.dtype, name="next")(y)


@pytest.mark.first(6)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("added", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("gate", "next_size"), [(False, 3), (False, 1), (True, 3)])
def test_a_norm_keeps_its_images_and_the_result(gate, next_size, added, dtype):
    filters, pixels, batch = 12, 32 * 32, 2
    block = Block(filters, gate, added, next_size, dtype)
    memory = resflax.count(block, (32, 32, 3), batch_size=batch).activation_memory
    # The first convolution's images and the norm's; the result is what the next one takes.
    images = batch * pixels * (3 + filters + filters) * jnp.dtype(dtype).itemsize
    # Numbers of each channel, of the batch and of each image, in float32.
    assert 0 < memory - images < 4 * filters * (batch + 1) * 8


@pytest.mark.long
def test_captured_intermediates_can_be_computed():
    model = resflax.create_model("cifar_resnet20", depth=8, num_filters=4)
    images = _normal(0, 2, 8, 8, 3)
    variables = model.init(jax.random.key(0), images, train=False)
    _, captured = model.apply(variables, images, train=False, capture_intermediates=True)
    block = captured["intermediates"]["stage2_block1"]
    (out,), (conv,), (normed,) = (
        part["__call__"] for part in (block, block["conv1"], block["norm1"])
    )
    assert isinstance(normed, norm.Affine)
    stats = variables["batch_stats"]["stage2_block1"]["norm1"]
    expected = (conv - stats["mean"].reshape(1, 1, 1, -1)) / np.sqrt(1 + 1e-5)
    _assert_close(norm.value(normed), expected, 1e-5)
    assert out.shape == (2, 8, 8, 4)


@pytest.mark.first(1)
@pytest.mark.parametrize(("channels", "groups"), [(24, 8), (64, 32), (7, 1)])
def test_group_norm_has_at_most_32_groups_of_equal_size(channels, groups):
    x = _normal(0, 2, 3, 5, channels)
    y, _ = layers.GroupNorm(epsilon=0.0).init_with_output(jax.random.key(0), x)
    grouped = np.asarray(x).reshape(2, 15, groups, -1)
    mean, variance = (f(grouped, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    expected = ((grouped - mean) / np.sqrt(variance)).reshape(x.shape)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
