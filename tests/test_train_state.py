"""Tests of the state that a network begins to train from."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resflax import create_model
from resflax.train_state import create_train_state

SHAPE = (4, 4, 3)


class Normed(nn.Module):
    """Parameters and running statistics, in a few numbers."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.BatchNorm(use_running_average=not train)(images.mean((1, 2)))
        return nn.Dense(2)(x)


class Plain(nn.Module):
    """Parameters only."""

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(2)(images.mean((1, 2)))


@functools.cache
def create(seed=0, ema=False):
    return create_train_state(Normed(), optax.sgd(0.1, 0.9), SHAPE, seed, ema=ema)


def arrays(state):
    """All arrays of a state, its key as numbers."""
    return jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))


def test_a_state_begins_before_its_first_step():
    state = create()
    for counter in (state.step, state.skipped):
        assert (counter, counter.dtype, counter.shape) == (0, jnp.int32, ())
    (trace, _) = state.opt_state
    assert jax.tree.map(jnp.shape, trace.trace) == jax.tree.map(jnp.shape, state.params)
    assert not any(map(jnp.any, jax.tree.leaves(trace.trace)))
    np.testing.assert_array_equal(state.batch_stats["BatchNorm_0"]["var"], np.ones(3))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.batch_stats))}
    assert dtypes == {jnp.dtype("float32")}
    assert state.loops == ()


def test_a_checkpoint_holds_all_that_a_step_changes_and_no_functions():
    paths = jax.tree_util.tree_leaves_with_path(create(ema=True))
    assert {path[0].name for path, _ in paths} == {
        *("step", "skipped", "params", "batch_stats", "opt_state", "ema", "key")
    }
    assert all(isinstance(leaf, jax.Array) for _, leaf in paths)


def test_a_seed_gives_the_same_state_and_another_seed_another():
    one, same, other = create(), create.__wrapped__(jnp.int32(0)), create(4)
    jax.tree.map(np.testing.assert_array_equal, arrays(one), arrays(same))
    kernels = [state.params["Dense_0"]["kernel"] for state in (one, other)]
    assert not np.array_equal(*kernels)
    keys = [jax.random.key_data(state.key) for state in (one, other)]
    assert not np.array_equal(*keys)


def test_a_state_can_be_created_inside_a_jitted_function():
    init = functools.partial(create_train_state, Normed(), optax.sgd(0.1, 0.9), SHAPE, ema=True)
    inside = jax.jit(init)(jnp.int32(0))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, arrays(inside), arrays(create(ema=True)))


def test_averages_begin_as_copies_of_what_they_average():
    state = create(ema=True)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    jax.tree.map(np.testing.assert_array_equal, state.ema, variables)
    # A step is given the state's buffers for good, so that each must stand in it once.
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.ema))]
    assert len(set(pointers)) == len(pointers)


def test_without_averages_the_variables_themselves_are_evaluated():
    state = create()
    assert state.ema is None
    assert state.eval_variables["params"] is state.params
    assert state.eval_variables["batch_stats"] is state.batch_stats
    images = jnp.ones((2, *SHAPE))
    logits = state.apply_fn(state.eval_variables, images, train=False)
    np.testing.assert_array_equal(logits, Normed().apply(state.eval_variables, images, train=False))


def test_with_averages_they_are_evaluated():
    state = create(ema=True)
    assert state.eval_variables is state.ema


@pytest.mark.parametrize("ema", [False, True])
def test_a_network_without_norms_has_empty_statistics(ema):
    state = create_train_state(Plain(), optax.sgd(0.1), SHAPE, 0, ema=ema)
    assert state.batch_stats == {}
    assert state.eval_variables["batch_stats"] == {}
    assert state.eval_variables["params"].keys() == {"Dense_0"}


def deep(**options):
    """A network with a loop in each of its stages, and the shapes of its state."""
    model = create_model("cifar_resnet20", num_filters=4, scan=2)
    init = functools.partial(
        create_train_state, model, optax.sgd(0.1, 0.9), (8, 8, 3), ema=False, **options
    )
    return model, jax.eval_shape(init, 0)


def test_a_network_trains_with_packed_variables():
    _, state = deep()
    packed = "stage3_block2..stage3_block3"
    assert state.loops[1:2] == (("stage3_block2", "stage3_block3"),)
    for tree in (state.params, state.batch_stats, state.opt_state[0].trace):
        assert packed in tree
        assert "stage3_block2" not in tree
    assert state.params[packed]["conv1"]["kernel"].shape == (2, 3, 3, 8, 8)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    apply = functools.partial(state.apply_fn, train=False)
    assert jax.eval_shape(apply, state.eval_variables, images).shape == (2, 10)


def test_a_function_in_place_of_the_network_s_own_sees_each_block():
    def apply_fn(*_, **__):
        pass

    model, state = deep(apply_fn=apply_fn)
    assert state.apply_fn is apply_fn
    assert state.loops == model.loops == ()
    assert {"stage3_block2", "stage3_block3"} < state.params.keys()
