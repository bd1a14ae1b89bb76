"""Tests of counting: parts, blocks that are traced once, the memory of a training step."""

import functools
import sys

import flax.linen as nn
import jax.numpy as jnp
import pytest

import resflax
from resflax import create_model
from resflax.models import layers

# `resflax.models.count` is the function.
module = sys.modules["resflax.models.count"]


# --- parts ---------------------------------------------------------------------------------------


def _assert_parts_add_up(counted):
    for field in ("params", "macs", "activations"):
        assert getattr(counted, field) == sum(getattr(p, field) for p in counted.parts.values())
    for part in counted.parts.values():
        if part.parts:
            _assert_parts_add_up(part)


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("name", "size"),
    [("se_resnext50_32x4d", 224), ("googlenet_bn", 224), ("cifar_densenet40_k12", 32)],
)
def test_parts_add_up_at_every_depth(name, size):
    _assert_parts_add_up(resflax.count(create_model(name), (size, size, 3)))


def test_parts_are_named_after_the_modules_in_the_order_of_their_use():
    counted = resflax.count(create_model("se_resnext50_32x4d"), (224, 224, 3))
    blocks = [f"stage{s}_block{i + 1}" for s, n in enumerate((3, 4, 6, 3), 2) for i in range(n)]
    assert list(counted.parts) == ["stem", *blocks, "dropout", "head"]
    assert counted.output_shape == (1000,)
    block = counted.parts["stage3_block1"]
    layers_ = [f"{kind}{i}" for i in (1, 2, 3) for kind in ("conv", "norm")]
    assert list(block.parts) == [*layers_, "se", "shortcut"]
    assert block.output_shape == (28, 28, 512)
    assert block.parts["conv1"].output_shape == (56, 56, 256)
    assert list(block.parts["se"].parts) == ["squeeze", "excite"]
    assert block.parts["se"].parts["squeeze"].params == 512 * 32 + 32
    grouped = block.parts["conv2"]
    assert (grouped.params, grouped.macs) == (9 * 8 * 256, 9 * 8 * 256 * 28**2)
    assert block.parts["norm3"] == resflax.models.Count(2 * 512, 0, 0, (28, 28, 512))


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        layer = nn.Dense(3, name="layer")
        return layer(layer(x))


def test_a_module_that_is_called_twice_has_its_parameters_once():
    counted = resflax.count(Twice(), (2, 2, 3))
    assert (counted.params, counted.macs, counted.activations) == (12, 2 * 4 * 9, 2 * 4 * 3)


class Own(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        scale = self.param("scale", nn.initializers.ones, (3,))
        return nn.Dense(2, name="layer")(x * scale.reshape(1, 1, 1, 3))


def test_parameters_of_no_part_are_the_modules_own():
    counted = resflax.count(Own(), (2, 2, 3))
    assert (counted.params, counted.parts["layer"].params) == (3 + 8, 8)


@pytest.mark.long
def test_auxiliary_classifiers_are_counted():
    plain, aux = (
        resflax.count(create_model("googlenet_bn", aux_heads=a), (224, 224, 3)) for a in (0, 1)
    )
    heads = [part for name, part in aux.parts.items() if name.endswith("_aux")]
    assert sum(head.macs for head in heads) == aux.macs - plain.macs
    # Per head: 1x1 to 128 on 4 x 4, 1024 units, 1000 units.
    assert [head.macs for head in heads] == [
        16 * c * 128 + 2048 * 1024 + 1024 * 1000 for c in (512, 528)
    ]


@pytest.mark.long
def test_the_mapped_axis_of_the_norms_needs_not_be_bound():
    synced = create_model("cifar_resnet20", axis_name="devices")
    plain = create_model("cifar_resnet20")
    shape = (32, 32, 3)
    assert resflax.count(synced, shape, batch_size=2) == resflax.count(plain, shape, batch_size=2)


# --- equal parts are traced once -----------------------------------------------------------------

REPEATING = [
    ("cifar_resnet56", {}),
    ("cifar_resnet56", {"shortcut": "C", "drop_path": 0.5}),
    ("cifar_se_resnet110", {"depth": 20}),
    ("cifar_preact_resnet164", {"depth": 29}),
    ("cifar_resnext29_8x64d", {}),
    ("cifar_densenet_bc100_k12", {"depth": 22}),
    ("inception_v3", {}),
]


@pytest.mark.first(1)
@pytest.mark.parametrize(("name", "overrides"), REPEATING)
def test_the_counts_are_those_of_tracing_everything(name, overrides, monkeypatch):
    model, side = create_model(name, **overrides), 75 if name == "inception_v3" else 32
    counted = resflax.count(model, (side, side, 3))
    monkeypatch.setattr(module, "_fields", lambda value: object())
    assert resflax.count(model, (side, side, 3)) == counted


# That nothing is traced twice is to be seen only where it is traced.
def test_a_deeper_network_traces_no_more_calls(monkeypatch):
    calls = []
    count_call = module._count_call
    monkeypatch.setattr(module, "_count_call", lambda *a: calls.append(a) or count_call(*a))
    traced = []
    for depth in (20, 110):
        calls.clear()
        resflax.count(create_model("cifar_se_resnet110", depth=depth), (32, 32, 3))
        traced.append(len(calls))
    assert traced[0] == traced[1]


class Block(nn.Module):
    conv: layers.ModuleDef

    @nn.compact
    def __call__(self, x):
        return self.conv(name="conv")(x)


class Blocks(nn.Module):
    convs: tuple

    @nn.compact
    def __call__(self, x, *, train):
        for conv in self.convs:
            x = Block(conv)(x)
        return x


@pytest.mark.parametrize(
    ("convs", "distinct"),
    [
        ([functools.partial(layers.Conv, 3) for _ in range(3)], 1),
        ([functools.partial(functools.partial(layers.Conv, 3), k) for k in (3, 3, 5)], 2),
        ([functools.partial(layers.Conv, 3, use_bias=b) for b in (True, False)], 2),
        ([functools.partial(layers.Conv, c) for c in (3, 4, 4)], 3),  # other inputs
        ([functools.partial(layers.Conv, 3), functools.partial(nn.Dense, 3)], 2),
    ],
)
def test_parts_are_equal_by_their_fields_and_inputs(convs, distinct, monkeypatch):
    calls = []
    count_call = module._count_call
    monkeypatch.setattr(module, "_count_call", lambda m, *a: calls.append(m) or count_call(m, *a))
    counted = resflax.count(Blocks(tuple(convs)), (8, 8, 3))
    assert len([m for m in calls if isinstance(m, Block)]) == distinct
    _assert_parts_add_up(counted)
    c_in, params = 3, 0
    for conv in convs:
        layer = conv()
        if isinstance(layer, nn.Dense):
            params += (c_in + 1) * 3
            continue
        params += (layer.window[0] ** 2 * c_in + layer.use_bias) * layer.filters
        c_in = layer.filters
    assert counted.params == params


# --- memory --------------------------------------------------------------------------------------


class Small(nn.Module):
    """A convolution, ReLU, dropout and a dense layer, on 8 x 8 x 3."""

    dtype: jnp.dtype = jnp.float32
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(layers.Conv(4, 3, dtype=self.dtype, name="conv")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(10, dtype=self.dtype, name="head")(x.reshape(x.shape[0], -1))


def _memory(model, batch_size, shape=(8, 8, 3)):
    return resflax.count(model, shape, batch_size=batch_size).activation_memory


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize(
    ("overrides", "per_image"),
    [
        # The images, where the ReLU lets through, and its result: what the gradients need.
        ({}, 8 * 8 * (3 * 4 + 4 + 4 * 4)),
        ({"dtype": jnp.bfloat16}, 8 * 8 * (3 * 2 + 4 + 4 * 2)),
        ({"dropout": 0.5}, 8 * 8 * (3 * 4 + 4 + 4 + 4 * 4)),  # and what was dropped
    ],
)
def test_memory_is_what_the_gradients_need(overrides, per_image, batch_size):
    assert _memory(Small(**overrides), batch_size) == batch_size * per_image


@pytest.mark.long
def test_memory_grows_by_the_same_for_every_image():
    one, two, five = (_memory(create_model("cifar_resnet20"), n, (32, 32, 3)) for n in (1, 2, 5))
    assert five - two == 3 * (two - one)
    # Beyond the images' share there are only the statistics of the batch.
    assert 0 < one - (two - one) < 0.02 * one


@pytest.mark.parametrize(("dtype", "width"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_memory_of_a_vgg(dtype, width):
    model = create_model("vgg11", num_classes=10, dtype=dtype)
    # What the convolutions and dense layers take: images, pools and ReLUs, whatever follows next.
    pooled = 16**2 * 64, 8**2 * 128, 4**2 * 256, 2**2 * 512, 1 * 512
    relus = 8**2 * 256 + 4**2 * 512 + 2**2 * 512
    inputs = 32**2 * 3 + sum(pooled[:-1]) + relus + 7**2 * 512 + 4096
    # A byte each: where a ReLU lets through, what dropout keeps, where in its window a maximum is.
    convs = 32**2 * 64 + 16**2 * 128 + 2 * 8**2 * 256 + 2 * 4**2 * 512 + 2 * 2**2 * 512
    masks = convs + 2 * 4096 + 2 * 4096 + sum(pooled)
    head = 4096 * 4  # in float32
    excess = _memory(model, 4, (32, 32, 3)) - 4 * (inputs * width + masks + head)
    assert 0 <= excess < 100  # a few scalars


def test_memory_is_counted_only_where_it_is_asked_for():
    assert _memory(Small(), None) is None
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        _memory(Small(), 0)
