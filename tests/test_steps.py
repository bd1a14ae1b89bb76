import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resflax import metrics as losses
from resflax import steps
from resflax.train_state import create_train_state

pytestmark = pytest.mark.devices(1, 8)


class Scale(nn.Module):
    """Logits (w, 0), and a running statistic that counts the steps."""

    @nn.compact
    def __call__(self, images, *, train):
        w = self.param("w", nn.initializers.ones, ())
        count = self.variable("batch_stats", "count", jnp.zeros, ())
        if train:
            count.value += 1
        return jnp.stack([w * jnp.ones(len(images)), jnp.zeros(len(images))], axis=-1)


BATCH = {"image": jnp.zeros((4, 2, 2, 1), jnp.uint8), "label": jnp.asarray([0, 0, 0, 1])}


def step(state, **settings):
    return steps.train_step(state, BATCH, axis_name=None, augment=lambda keys, x: x, **settings)


def state_of(ema=False):
    return create_train_state(Scale(), optax.sgd(0.5), (2, 2, 1), seed=0, ema=ema)


@pytest.mark.devices(1, 8, long=8)
def test_a_step_descends_the_mean_loss():
    state, metrics = step(state_of())
    p = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(metrics["loss"], -0.75 * np.log(p) - 0.25 * np.log(1 - p), rtol=1e-6)
    np.testing.assert_allclose(metrics["top1"], 0.75)
    np.testing.assert_allclose(metrics["grad_norm"], abs(p - 0.75), rtol=1e-5)
    np.testing.assert_allclose(state.params["w"], 1 - 0.5 * (p - 0.75), rtol=1e-6)
    assert state.step == 1
    assert state.batch_stats["count"] == 1


def test_label_smoothing_reaches_the_loss():
    _, plain = step(state_of())
    smoothed = functools.partial(losses.cross_entropy, label_smoothing=0.5)
    _, smooth = step(state_of(), loss=smoothed)
    assert smooth["loss"] > plain["loss"]


class WithHeads(Scale):
    """The same, with two auxiliary classifiers that are always wrong by the same amount."""

    @nn.compact
    def __call__(self, images, *, train):
        w = self.param("w", nn.initializers.ones, ())
        if train:
            for _ in range(2):
                logits = jnp.stack([jnp.zeros(len(images)), w * jnp.ones(len(images))], axis=-1)
                self.sow("intermediates", "aux_logits", logits)
        return jnp.stack([w * jnp.ones(len(images)), jnp.zeros(len(images))], axis=-1)


def test_auxiliary_classifiers_add_their_weighted_losses():
    state = create_train_state(WithHeads(), optax.sgd(0.5), (2, 2, 1), seed=0, ema=False)
    p = 1 / (1 + np.exp(-1.0))
    loss = -0.75 * np.log(p) - 0.25 * np.log(1 - p)
    aux = -0.75 * np.log(1 - p) - 0.25 * np.log(p)
    for weight in (0.0, 0.3):
        after, metrics = step(state, aux_weight=weight)
        np.testing.assert_allclose(metrics["loss"], loss + 2 * weight * aux, rtol=1e-6)
        descent = (p - 0.75) + 2 * weight * (p - 0.25)
        np.testing.assert_allclose(after.params["w"], 1 - 0.5 * descent, rtol=1e-6)


def test_the_average_follows_parameters_and_statistics():
    state = state_of(ema=True)
    w, count = 1.0, 0.0
    for i in range(4):
        decay = min(0.3, (1 + i) / (10 + i))
        state, _ = step(state, ema_decay=0.3)
        w = decay * w + (1 - decay) * float(state.params["w"])
        count = decay * count + (1 - decay) * (i + 1)
    np.testing.assert_allclose(state.ema["params"]["w"], w, rtol=1e-6)
    np.testing.assert_allclose(state.ema["batch_stats"]["count"], count, rtol=1e-6)
    assert state.eval_variables is state.ema
    assert state_of().eval_variables["params"]["w"] == 1.0


def test_random_numbers_differ_between_steps_and_repeat_for_one():
    seen = []

    def augment(keys, images):
        seen.append(np.asarray(jax.random.key_data(keys)))
        return images

    state = state_of()
    first, _ = steps.train_step(state, BATCH, axis_name=None, augment=augment)
    steps.train_step(first, BATCH, axis_name=None, augment=augment)
    steps.train_step(state, BATCH, axis_name=None, augment=augment)
    assert len(np.unique(seen[0], axis=0)) == 4
    assert not np.array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0], seen[2])


@pytest.mark.parametrize("masked", [0, 3])
def test_evaluation_sums_over_the_mask(masked):
    batch = {**BATCH, "mask": jnp.ones(4).at[masked].set(0.0)}
    state = state_of()
    sums = steps.eval_step(
        state.eval_variables,
        batch,
        axis_name=None,
        apply_fn=state.apply_fn,
        normalize=lambda x: x,
    )
    assert sums["count"] == 3
    assert sums["top1"] == (2 if masked == 0 else 3)


def test_a_mixed_batch_is_learned_by_what_it_is_made_of():
    def mix(key, images, labels):
        return images, jnp.full((len(labels), 2), 0.5)

    state, metrics = step(state_of(), mix=mix)
    p = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(metrics["loss"], -0.5 * np.log(p * (1 - p)), rtol=1e-6)
    np.testing.assert_allclose(state.params["w"], 1 - 0.5 * (p - 0.5), rtol=1e-6)
    # What the network says is still compared with the labels.
    np.testing.assert_allclose(metrics["top1"], 0.75)


class Steep(Scale):
    """Logits that are finite, with a derivative that is not."""

    @nn.compact
    def __call__(self, images, *, train):
        w = self.param("w", nn.initializers.ones, ())
        root = jnp.sqrt(w - 1)
        return jnp.stack([root * jnp.ones(len(images)), jnp.zeros(len(images))], axis=-1)


def test_a_gradient_that_is_not_finite_is_skipped_behind_a_finite_loss():
    state = create_train_state(Steep(), optax.sgd(0.5, 0.9), (2, 2, 1), seed=0, ema=True)
    after, metrics = step(state, ema_decay=0.5)
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert (metrics["skipped"], after.step) == (1, 1)
    for name in ("params", "batch_stats", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
