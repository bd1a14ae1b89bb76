import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from small import config as small_config

from resflax import config as config_lib
from resflax import train
from resflax.data import pipeline, sources
from resflax.parallel import DataParallel


@dataclasses.dataclass(frozen=True)
class ThreeSteps:
    """What three steps of the small run leave, augmentation included."""

    variables: Any
    hlo: str
    donated: bool


@functools.cache
def three_steps(mode, num_devices, bn_axis):
    config = small_config(**{"parallel.mode": mode, "model.bn_axis": bn_axis})
    parallel = DataParallel.over(mode, jax.devices()[:num_devices])
    dataset = sources.load(config.data)
    batches = pipeline.TrainBatches(dataset.train, batch_size=32, seed=0, put=parallel.put)
    model = config_lib.build_model(config, 10, parallel.axis_name)
    # A small rate: where rounding moves an activation over the kink of a ReLU, the gradient jumps.
    first = state = train._create_state(config, model, dataset, lambda step: 0.01, parallel)
    train_step = train._train_step(config, dataset, parallel)
    compiled = train_step.lower(state, next(batches)).compile()
    batches.seek({"next_index": 0})
    for _ in range(3):
        state, metrics = compiled(state, next(batches))
    assert np.isfinite(parallel.fetch(metrics)["loss"])
    donated = all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    state = parallel.single(state)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return ThreeSteps(jax.device_get(variables), compiled.as_text(), donated)


def largest_difference(a, b, collection="params"):
    a, b = a.variables[collection], b.variables[collection]
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), a, b)))


ONE_DEVICE = ("jit", 1, "global")


@pytest.mark.parametrize("mode", ["shard_map", "pmap", "jit"])
def test_eight_devices_with_global_batch_norm_compute_what_one_does(mode):
    one, eight = three_steps(*ONE_DEVICE), three_steps(mode, 8, "global")
    assert largest_difference(one, eight) < 1e-5
    assert largest_difference(one, eight, "batch_stats") < 1e-5


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_batch_norm_per_device_is_another_function(mode):
    one, eight = three_steps(*ONE_DEVICE), three_steps(mode, 8, "device")
    assert largest_difference(one, eight) > 1e-4
    assert largest_difference(one, eight, "batch_stats") > 1e-2


def test_shard_map_and_pmap_agree_on_batch_norm_per_device():
    shard_map, pmap = three_steps("shard_map", 8, "device"), three_steps("pmap", 8, "device")
    assert largest_difference(shard_map, pmap) < 1e-5


@pytest.mark.parametrize("mode", ["shard_map", "pmap", "jit"])
def test_the_state_is_donated(mode):
    assert three_steps(mode, 8, "global").donated


@pytest.mark.parametrize("mode", ["shard_map", "pmap", "jit"])
def test_batches_are_not_gathered(mode):
    hlo = three_steps(mode, 8, "global").hlo
    assert "all-reduce" in hlo
    assert "all-gather" not in hlo


@pytest.mark.parametrize(
    ("fields", "right"),
    [
        ({"train.batch_size": 36}, "32 or 40"),
        ({"eval.batch_size": 3}, "8 or 16"),
        ({"parallel.mode": "jit"}, "model.bn_axis to 'global'"),
    ],
)
def test_what_does_not_fit_the_devices_is_refused(fields, right):
    with pytest.raises(config_lib.ConfigError, match=right):
        config_lib.validate(small_config(**fields), 8)
