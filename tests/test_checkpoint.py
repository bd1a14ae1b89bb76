import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from resflax.checkpoint import Checkpointer
from resflax.parallel import DataParallel
from resflax.train_state import create_train_state


class Linear(nn.Module):
    """The least network that has all a state has."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.BatchNorm(use_running_average=not train)(images.mean((1, 2)))
        return nn.Dense(3)(x)


def create(parallel, seed, ema=True):
    init = functools.partial(create_train_state, Linear(), optax.sgd(0.1, 0.9), (4, 4, 2), ema=ema)
    return parallel.create(init, seed)


def leaves(parallel, state):
    single = parallel.single(state).replace(key=jax.random.key_data(parallel.single(state).key))
    return jax.device_get(jax.tree.leaves(single))


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("to", [("shard_map", 1), ("jit", 2), ("pmap", 8), ("shard_map", 8)])
@pytest.mark.parametrize("source", [("shard_map", 1), ("pmap", 2), ("shard_map", 8)])
def test_a_state_moves_between_devices_and_modes(source, to, ema, tmp_path):
    source, to = (DataParallel.over(mode, jax.devices()[:n]) for mode, n in (source, to))
    state = create(source, seed=0, ema=ema)
    saver = Checkpointer(tmp_path, keep=1)
    saver.save(source.single(state), {"next_index": 7}, {"top1": 0.5})
    saver.close()
    loader = Checkpointer(tmp_path, keep=1)
    other = create(to, seed=1, ema=ema)
    restored, position = loader.restore_latest(to.single(other), to.replicated)
    loader.close()
    restored = to.spread(restored)
    assert position == {"next_index": 7}
    for a, b in zip(leaves(source, state), leaves(to, restored), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(len(leaf.devices()) == to.num_devices for leaf in jax.tree.leaves(restored))


def test_the_latest_and_the_best_are_kept(tmp_path):
    parallel = DataParallel.over("jit", jax.devices()[:1])
    state = create(parallel, seed=0)
    checkpointer = Checkpointer(tmp_path, keep=2)
    assert checkpointer.restore_latest(state, parallel.replicated) is None
    assert checkpointer.best is None
    for step, top1 in enumerate((0.1, 0.9, 0.3, 0.4, 0.5), start=1):
        checkpointer.save(state.replace(step=step), {}, {"top1": top1})
    checkpointer.wait()
    assert checkpointer.best == (2, 0.9)
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.is_dir())
    assert steps == [2, 4, 5]
    checkpointer.close()
