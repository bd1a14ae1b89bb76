"""Equal blocks as one loop: the same function, the same variables, whatever runs them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import config as small_config

import resflax
from resflax import train
from resflax.models import repeat
from resflax.train_state import create_train_state

IMAGES = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))

# Three blocks a stage: one that changes the shape, and two equal ones; four, where the last of them
# halves the image; two, which are equal in the first stage alone.
NETWORKS = {
    "shallow": {"name": "cifar_resnet20", "depth": 14},
    "basic": {"name": "cifar_resnet20", "depth": 20},
    "preact": {"name": "cifar_preact_resnet164", "depth": 29},
    "grouped": {"name": "cifar_resnext29_8x64d", "cardinality": 4, "base_width": 32},
    "gated": {"name": "cifar_se_resnet110", "depth": 20, "se_reduction": 4},
    "strided_last": {"name": "cifar_preact_resnet110", "depth": 26, "downsample": "last"},
}
DEEP_STAGES = {"stage2_block2..stage2_block3", "stage3_block2..stage3_block3"}


def network(key="basic", **overrides):
    settings = {"num_filters": 8, "num_classes": 3, "scan": 2, **NETWORKS[key], **overrides}
    return resflax.create_model(**settings)


@functools.cache
def init(model):
    return jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0, impl="rbg"), IMAGES
    )


@functools.partial(jax.jit, static_argnums=0)
def results(model, variables):
    """Gradients, logits and updated statistics."""

    def loss(params):
        logits, mutated = model.apply(
            variables | {"params": params}, IMAGES, train=True, mutable=["batch_stats"]
        )
        return jnp.mean(jnp.sum(logits**2, -1)), (logits, mutated["batch_stats"])

    return jax.grad(loss, has_aux=True)(variables["params"])


def assert_close(a, b, tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(x).max())


@pytest.mark.parametrize(
    "key",
    ["shallow", pytest.param("basic", marks=pytest.mark.long)]
    + [pytest.param(key, marks=pytest.mark.slow) for key in (*NETWORKS,)[2:]],
)
def test_a_loop_computes_what_its_blocks_do(key):
    blocks, loop = network(key, scan=0), network(key)
    variables = init(blocks)
    jax.tree.map(np.testing.assert_array_equal, variables, init(loop))
    assert_close(results(blocks, variables), results(loop, variables), 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("scan", [0, 2])
def test_blocks_computed_twice_give_the_same(scan):
    plain, twice = network(), network(scan=scan, remat=True)
    variables = init(plain)
    assert_close(results(plain, variables), results(twice, variables), 1e-4)
    saved = [resflax.count(m, (8, 8, 3), batch_size=2).activation_memory for m in (plain, twice)]
    assert saved[1] < 0.6 * saved[0]


# With eight devices, whose convolutions are written out: kernels are calls, of few lines.
@pytest.mark.long
@pytest.mark.devices(8)
def test_the_program_of_a_loop_does_not_grow_with_the_depth():
    def size(depth, scan):
        model = network(depth=depth, scan=scan, packed=True)
        start = functools.partial(model.init, train=False)
        variables = jax.eval_shape(start, jax.random.key(0), IMAGES)
        return len(results.lower(model, variables).as_text().splitlines())

    assert size(20, 2) == size(110, 2)
    # Block by block it would: 54 blocks and 9.
    assert size(110, 0) > 4 * size(20, 0)


@pytest.mark.long
def test_blocks_of_a_loop_start_differently():
    kernels = [init(network())["params"][f"stage2_block{i}"]["conv1"]["kernel"] for i in (1, 2, 3)]
    for i, kernel in enumerate(kernels):
        for other in kernels[i + 1 :]:
            assert np.abs(kernel - other).min() > 0


@pytest.mark.long
def test_stochastic_depth_in_a_loop_has_each_blocks_rate_and_its_own_draws():
    def train_logits(model, variables, seed):
        rngs = {"dropout": jax.random.key(seed)}
        apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        return jax.jit(apply)(variables, IMAGES, rngs=rngs)[0]

    looped = network(drop_path=0.9)
    variables = init(looped)
    evaluate = [
        m.apply(variables, IMAGES, train=False) for m in (looped, network(scan=0, drop_path=0.9))
    ]
    np.testing.assert_allclose(*evaluate, rtol=1e-4, atol=1e-5)
    different = {float(train_logits(looped, variables, seed)[0, 0]) for seed in range(6)}
    assert len(different) > 3


class Noise(nn.Module):
    """Adds random numbers."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, ())
        return x + scale * jax.random.normal(self.make_rng("dropout"), x.shape)


class Noises(nn.Module):
    """Adds them a number of times, in a loop."""

    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        if self.is_initializing():
            repeat.create(self, Noise(parent=None), self.names, x, packed=False)
        return repeat.loop(self, Noise(parent=None), self.names, x, packed=False)


class Keys(nn.Module):
    """The key that the top module of a network makes."""

    @nn.compact
    def __call__(self):
        return self.make_rng("dropout")


def test_each_block_of_a_loop_draws_random_numbers_of_its_own():
    def noise(blocks, seed):
        model, x = Noises(tuple(f"block{i}" for i in range(blocks))), jnp.zeros((4,))
        variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, x)
        return np.asarray(model.apply(variables, x, rngs={"dropout": jax.random.key(seed)}))

    assert not np.allclose(noise(2, seed=1), noise(2, seed=2))
    np.testing.assert_array_equal(noise(2, seed=1), noise(2, seed=1))
    # Two blocks that drew the same would add up to twice what one of them adds.
    key = jax.random.split(Keys().apply({}, rngs={"dropout": jax.random.key(1)}), 2)[0]
    assert not np.allclose(noise(2, seed=1), 2 * jax.random.normal(key, (4,)))


@pytest.mark.long
def test_packed_variables_are_the_same_ones_stacked():
    model, packed = network(), network(packed=True)
    variables = init(model)
    stacked = init(packed)
    assert stacked["params"].keys() >= DEEP_STAGES
    assert not model.loops
    jax.tree.map(np.testing.assert_array_equal, repeat.pack(variables, packed.loops), stacked)
    jax.tree.map(np.testing.assert_array_equal, repeat.unpack(stacked, packed.loops), variables)
    assert_close(
        repeat.pack(results(model, variables), packed.loops), results(packed, stacked), 1e-4
    )


def test_ten_blocks_are_stacked_in_the_order_of_their_use():
    names = tuple(f"block{i}" for i in range(1, 12))
    tree = {"stem": 0, **{name: {"bias": np.full(2, i)} for i, name in enumerate(names)}}
    packed = repeat.pack(tree, (names,))
    assert packed.keys() == {"stem", "block1..block11"}
    np.testing.assert_array_equal(packed["block1..block11"]["bias"][:, 0], range(11))
    jax.tree.map(np.testing.assert_array_equal, repeat.unpack(packed, (names,)), tree)


@pytest.mark.long
def test_states_of_optimizers_pack_too():
    model = network(packed=True)
    state = create_train_state(model, optax.sgd(0.1, 0.9), (8, 8, 3), seed=0, ema=True)
    assert hash(state.loops)
    unpacked = repeat.unpack((state.opt_state, state.ema), state.loops)
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(unpacked)
    ]
    assert not any(".." in path for path in paths)
    assert sum("stage4_block2" in path and "conv1" in path for path in paths) == 2
    packed = repeat.pack(unpacked, state.loops)
    jax.tree.map(np.testing.assert_array_equal, packed, (state.opt_state, state.ema))


def test_scan_zero_is_never_and_a_short_run_is_none():
    assert network(packed=True, scan=0).loops == ()
    assert network(packed=True, scan=3).loops == ()
    assert len(network(packed=True, scan=2).loops) == 3
    with pytest.raises(ValueError, match="scan -1"):
        network(scan=-1)


@pytest.mark.slow
def test_inception_blocks_loop_too():
    blocks, loop, packed = (
        resflax.create_model(
            "inception_resnet_v2", num_classes=3, stage_sizes=(2, 1, 3), se_reduction=16, **fields
        )
        for fields in ({"scan": 0}, {"scan": 2}, {"scan": 2, "packed": True})
    )
    images = jax.random.normal(jax.random.key(1), (2, 75, 75, 3))
    variables = jax.jit(functools.partial(blocks.init, train=False))(
        jax.random.key(0, impl="rbg"), images
    )
    # The last block, which is linear, is another one.
    assert packed.loops == (("block_a1", "block_a2"), ("block_c1", "block_c2"))
    expected = jax.jit(functools.partial(blocks.apply, train=False))(variables, images)
    for model in (loop, packed):
        apply = jax.jit(functools.partial(model.apply, train=False))
        logits = apply(repeat.pack(variables, model.loops), images)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.devices(8)
@pytest.mark.parametrize("mode", ["shard_map", pytest.param("pmap", marks=pytest.mark.slow)])
def test_a_run_with_loops_restores_without_them_and_goes_on(tmp_path, mode):
    deep = {
        "model.name": "cifar_resnet20",
        "model.depth": 20,
        "model.num_filters": 4,
        "model.cardinality": None,
        "model.base_width": None,
        "model.se_reduction": None,
        "model.scan": 2,
        "train.ema_decay": 0.5,
        "parallel.mode": mode,
    }
    one_go = train.train_and_evaluate(small_config(**deep), tmp_path / "one_go")
    first = small_config(**deep)
    train.train_and_evaluate(first, tmp_path / "run")
    run = resflax.restore(tmp_path / "run")
    assert run.model.loops == ()
    assert "stage2_block2" in run.variables["params"]
    again = train.train_and_evaluate(first, tmp_path / "run")
    assert again["eval/loss"] == pytest.approx(one_go["eval/loss"], rel=1e-6)
