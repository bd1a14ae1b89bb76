"""A step on parts of a batch, and one that is skipped, of a network with a layer of each kind."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from plain import config as plain_config

from resflax import build, optimizers, steps
from resflax import config as config_lib
from resflax.data import sources
from resflax.parallel import data_parallel
from resflax.train_state import create_train_state

pytestmark = pytest.mark.devices(8)


class Tiny(nn.Module):
    """A convolution, a norm and a classifier."""

    norm: str

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Conv(8, (3, 3))(images)
        if self.norm == "batch":
            x = nn.BatchNorm(use_running_average=not train)(x)
        elif self.norm == "group":
            x = nn.GroupNorm(4)(x)
        return nn.Dense(10)(nn.silu(x).mean((1, 2)))


class Step(NamedTuple):
    """What a step leaves."""

    variables: Any
    metrics: dict[str, float]


def largest_difference(a, b):
    return max(
        jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), a.variables, b.variables))
    )


@functools.cache
def take_step(mode, num_devices, norm, parts=1, order=tuple(range(32)), scale=1 / 255, rho=0.0):
    """What a step on 32 images, in some order, leaves; nothing may have been gathered."""
    parallel = data_parallel(mode, jax.devices()[:num_devices])
    tx = optax.sgd(0.5)
    init = functools.partial(create_train_state, Tiny(norm), tx, (8, 8, 3), ema=False)
    state = parallel.create(init, 0)
    train_step = functools.partial(
        steps.train_step,
        axis_name=parallel.axis_name,
        augment=lambda keys, images: images * scale,
        accumulation=parts,
        sam_rho=rho,
    )
    step = parallel.step(train_step, donate_state=True)
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(32, 8, 8, 3), dtype=np.uint8)
    batch = {"image": images, "label": rng.integers(10, size=32, dtype=np.int32)}
    placed = parallel.put({name: array[list(order)] for name, array in batch.items()})
    hlo = step.lower(state, placed).compile().as_text()
    assert "all-gather" not in hlo
    assert "all-to-all" not in hlo
    state, metrics = step(state, placed)
    variables = jax.device_get(parallel.single(state).eval_variables)
    return Step(variables, *parallel.fetch(metrics))


WHOLE = ("jit", 1, "group")


@pytest.mark.long
@pytest.mark.parametrize(("mode", "devices"), [("shard_map", 8), ("jit", 1), ("pmap", 8)])
def test_an_update_that_is_not_finite_is_skipped_everywhere(mode, devices):
    skipped = take_step(mode, devices, "batch", scale=float("nan"))
    assert np.isnan(skipped.metrics["loss"])
    assert skipped.metrics["skipped"] == 1
    fresh = jax.device_get(
        Tiny("batch").init(jax.random.key(0, impl="rbg"), np.zeros((1, 8, 8, 3)), train=False)
    )
    jax.tree.map(np.testing.assert_array_equal, skipped.variables, fresh)
    assert take_step(mode, devices, "batch").metrics["skipped"] == 0


@pytest.mark.first(2)
@pytest.mark.parametrize(
    ("mode", "devices", "parts"),
    [("jit", 1, 4), ("shard_map", 8, 4), ("jit", 8, 2), ("pmap", 8, 2)],
)
@pytest.mark.parametrize("norm", ["group", "none"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(mode, devices, parts, norm):
    apart, whole = take_step(mode, devices, norm, parts), take_step("jit", 1, norm)
    assert largest_difference(apart, whole) < 1e-5
    for name in ("loss", "top1", "grad_norm"):
        np.testing.assert_allclose(apart.metrics[name], whole.metrics[name], rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "devices", "parts"),
    [("jit", 1, 4), ("shard_map", 8, 4), ("jit", 8, 2), ("pmap", 8, 2)],
)
def test_sharpness_is_that_of_the_whole_batch(mode, devices, parts):
    apart, whole = (take_step(*how, rho=0.5) for how in ((mode, devices, "group", parts), WHOLE))
    assert largest_difference(apart, whole) < 1e-5
    np.testing.assert_allclose(apart.metrics["grad_norm"], whole.metrics["grad_norm"], rtol=1e-5)
    assert largest_difference(whole, take_step(*WHOLE)) > 1e-3


@pytest.mark.long
def test_batch_norm_sees_a_part_as_it_would_on_a_device_of_its_own():
    apart = take_step("jit", 1, "batch", 4)
    # Part i has every fourth image from the i-th on; a device has a run of them.
    order = tuple(np.arange(32).reshape(8, 4).T.ravel())
    devices = take_step("shard_map", 4, "batch", order=order)
    assert largest_difference(apart, devices) < 1e-5
    assert largest_difference(apart, take_step("jit", 1, "batch")) > 1e-4


@pytest.mark.slow
def test_a_config_has_batches_in_parts():
    """The network of a run, and its 8 devices; whose memory is what it is for."""
    memory = []
    for parts in (1, 4):
        fields = {"model.norm": "none", "train.grad_accumulation": parts}
        config = plain_config(**fields)
        parallel = data_parallel("jit", jax.devices()[:1])
        dataset = sources.load(config.data)
        model = config_lib.build_model(config, 10)
        optimizer = optimizers.optimizer(config.optim, lambda step: 0.1)
        state = build.create_state(config, model, dataset, optimizer, parallel)
        batch = parallel.put(dataset.train.train_batch(np.arange(32), np.arange(32)))
        loss = build.loss(config, dataset, parallel)
        compiled = build.train_step(config, dataset, parallel, loss).lower(state, batch).compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
        last = compiled(state, batch)[1]["loss"]
        if parts == 1:
            first = last
    np.testing.assert_allclose(first, last, rtol=1e-5)
    assert memory[1] < 0.5 * memory[0]
