import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import config as small_config

from resflax import optimizers


def schedule(**fields):
    config = small_config(**{f"optim.{k}": v for k, v in fields.items()})
    config.train.update(batch_size=512, epochs=10.0)
    return optimizers.learning_rate(config, steps_per_epoch=100)


def test_cosine_goes_from_the_scaled_peak_to_zero():
    lr = schedule(lr=0.1, warmup_epochs=0.0)
    np.testing.assert_allclose([lr(0), lr(500), lr(1000)], [0.2, 0.1, 0.0], atol=1e-7)


def test_warmup_is_linear_and_meets_the_schedule():
    lr = schedule(lr=0.1, warmup_epochs=2.0)
    np.testing.assert_allclose([lr(0), lr(100), lr(200), lr(600)], [0, 0.1, 0.2, 0.1], atol=1e-7)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_steps_fall_after_their_epochs(warmup):
    lr = schedule(schedule="step", step_epochs=(5.0, 8.0), step_factor=0.1, warmup_epochs=warmup)
    values = [lr(499), lr(500), lr(799), lr(800), lr(999)]
    np.testing.assert_allclose(values, [0.2, 0.02, 0.02, 0.002, 0.002], rtol=1e-5)


PARAMS = {"kernel": jnp.asarray([[1.0, -2.0]]), "bias": jnp.asarray([3.0])}
GRADS = {"kernel": jnp.asarray([[0.5, 0.25]]), "bias": jnp.asarray([-1.0])}


def after(steps, **fields):
    """The parameters after some steps with the same gradient and a learning rate of 0.1."""
    optim = small_config(**{f"optim.{k}": v for k, v in fields.items()}).optim
    tx = optimizers.optimizer(optim, optax.constant_schedule(0.1))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs(nesterov):
    # v = m v + g + wd w; w -= lr v, or with Nesterov w -= lr (g + wd w + m v).
    w, v = 3.0, 0.0
    for _ in range(3):
        g = -1.0 + 0.01 * w
        v = 0.9 * v + g
        w -= 0.1 * (g + 0.9 * v if nesterov else v)
    params = after(3, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    np.testing.assert_allclose(params["bias"], [w], rtol=1e-6)


def test_decay_can_leave_out_norms_and_biases():
    with_all = after(1, momentum=0.0, weight_decay=0.5, decay_norm_and_bias=True)
    kernels = after(1, momentum=0.0, weight_decay=0.5, decay_norm_and_bias=False)
    np.testing.assert_allclose(kernels["bias"], [3.1], rtol=1e-6)
    np.testing.assert_allclose(with_all["bias"], [3.1 - 0.15], rtol=1e-6)
    np.testing.assert_allclose(kernels["kernel"], with_all["kernel"])


def test_clipping_bounds_the_gradient_not_the_decay():
    params = after(1, momentum=0.0, weight_decay=0.5, clip_norm=0.1)
    norm = np.sqrt(0.5**2 + 0.25**2 + 1.0)
    expected = 3.0 - 0.1 * (-1.0 * 0.1 / norm + 0.5 * 3.0)
    np.testing.assert_allclose(params["bias"], [expected], rtol=1e-6)


def test_exponential_falls_by_its_factor_after_each_span():
    lr = schedule(lr=0.1, schedule="exponential", decay_epochs=2.0, step_factor=0.94)
    steps = [0, 199, 200, 399, 400, 999]
    expected = [0.2 * 0.94**n for n in (0, 0, 1, 1, 2, 4)]
    np.testing.assert_allclose([lr(s) for s in steps], expected, rtol=1e-6)


def test_rmsprop_divides_by_the_running_mean_square():
    config = small_config(**{"optim.name": "rmsprop", "optim.rms_decay": 0.9}).optim
    config.update(rms_epsilon=1.0, momentum=0.0, weight_decay=0.0)
    optimizer = optimizers.optimizer(config, lambda step: 0.1)
    params = {"kernel": jnp.asarray([1.0])}
    state, square = optimizer.init(params), 1.0
    for gradient in (2.0, -3.0):
        updates, state = optimizer.update({"kernel": jnp.asarray([gradient])}, state, params)
        square = 0.9 * square + 0.1 * gradient**2
        np.testing.assert_allclose(
            updates["kernel"], -0.1 * gradient / np.sqrt(square + 1), rtol=1e-6
        )


def test_rates_to_be_logged_are_the_schedules():
    schedule = optax.cosine_decay_schedule(0.5, 40)
    rate = optimizers.on_processor(schedule)
    assert [rate(step) for step in (0, 7, 40)] == pytest.approx(
        [float(schedule(step)) for step in (0, 7, 40)], rel=1e-6
    )
    assert isinstance(rate(3), float)
