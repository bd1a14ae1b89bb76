import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from plain import config as plain_config
from small import config as small_config

import resflax
from resflax import build, optimizers, train
from resflax import config as config_lib
from resflax.parallel import data_parallel


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


RNG = np.random.default_rng(0)


def arrays(scale):
    shapes = {"conv/kernel": (3, 3, 4, 6), "conv/bias": (6,), "norm/scale": (6,)}
    shapes |= {"head/kernel": (6, 5), "head/bias": (5,)}
    tree = {"conv": {}, "norm": {}, "head": {}}
    for path, shape in shapes.items():
        layer, name = path.split("/")
        tree[layer][name] = jnp.asarray(RNG.normal(0, scale, shape), jnp.float32)
    return tree


LAYERS, SLOPES = arrays(1.0), [arrays(0.1) for _ in range(3)]


def descended(tx, params=LAYERS):
    """The parameters after three steps with other gradients."""
    state = tx.init(params)
    for slope in SLOPES:
        updates, state = tx.update(slope, state, params)
        params = optax.apply_updates(params, updates)
    return params


def named(name, **fields):
    optim = small_config(**{"optim.name": name, "optim.weight_decay": 0.1}).optim
    optim.update_from_flattened_dict(fields)
    return optimizers.optimizer(optim, optax.constant_schedule(0.01))


def kernels(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def matrices(params):
    def axes(path, leaf):
        if path[-1].key == "kernel" and path[0].key == "conv":
            return optax.contrib.MuonDimensionNumbers((0, 1, 2), (3,))
        return None

    return jax.tree_util.tree_map_with_path(axes, params)


OF_OPTAX = {
    "sgd": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.01, 0.9, nesterov=True)),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "lamb": optax.lamb(0.01, weight_decay=0.1),
    "lars": optax.lars(0.01, weight_decay=0.1, trust_ratio_mask=kernels),
    "lion": optax.lion(0.01, weight_decay=0.1),
    "muon": optax.contrib.muon(
        0.01,
        weight_decay=0.1,
        adam_weight_decay=0.1,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
    ),
}


@pytest.mark.parametrize("name", OF_OPTAX)
def test_an_optimizer_of_the_table_is_optaxs(name):
    ours, theirs = descended(named(name)), descended(OF_OPTAX[name])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), ours, theirs)


def test_every_optimizer_is_compared():
    assert optimizers.OPTIMIZERS.keys() == OF_OPTAX.keys() | {"rmsprop"}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_coupled_and_decoupled_decay_are_torchs(name):
    torch = pytest.importorskip("torch")
    leaves = jax.tree.leaves(LAYERS)
    params = [torch.tensor(np.asarray(leaf), requires_grad=True) for leaf in leaves]
    if name == "sgd":
        theirs = torch.optim.SGD(params, 0.01, 0.9, weight_decay=0.1, nesterov=True)
    else:
        theirs = torch.optim.AdamW(params, 0.01, weight_decay=0.1)
    for slope in SLOPES:
        for param, gradient in zip(params, jax.tree.leaves(slope), strict=True):
            param.grad = torch.tensor(np.asarray(gradient))
        theirs.step()
    after = jax.tree.leaves(descended(named(name)))
    for ours, param in zip(after, params, strict=True):
        np.testing.assert_allclose(ours, param.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_decoupled_decay_is_outside_of_the_momentum_and_coupled_decay_in_it():
    zero = jax.tree.map(jnp.zeros_like, LAYERS)
    moved = {}
    for name in ("sgd", "adamw"):
        tx = named(name)
        updates, _ = tx.update(zero, tx.init(LAYERS), LAYERS)
        moved[name] = updates["conv"]["kernel"] / LAYERS["conv"]["kernel"]
    np.testing.assert_allclose(moved["adamw"], -0.01 * 0.1, rtol=1e-4)
    np.testing.assert_allclose(moved["sgd"], -0.01 * 0.1 * 1.9, rtol=1e-4)


def test_adaptive_clipping_bounds_each_output_by_its_weights():
    optim = small_config(**{"optim.clip_adaptive": 0.02}).optim
    optim.update(momentum=0.0, weight_decay=0.0)
    tx = optimizers.optimizer(optim, optax.constant_schedule(1.0))
    updates, _ = tx.update(SLOPES[0], tx.init(LAYERS), LAYERS)
    weights, gradient = LAYERS["conv"]["kernel"], SLOPES[0]["conv"]["kernel"]
    for k in range(6):
        most = 0.02 * np.linalg.norm(weights[..., k])
        norm = np.linalg.norm(gradient[..., k])
        expected = -gradient[..., k] * min(1.0, most / norm)
        assert norm > most
        np.testing.assert_allclose(updates["conv"]["kernel"][..., k], expected, rtol=1e-5)
    np.testing.assert_allclose(updates["head"]["kernel"], -SLOPES[0]["head"]["kernel"])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_multipliers_are_of_the_first_expression_that_begins_a_path(name):
    multipliers = (("head/bias", 0.0, 1.0), ("head", 2.0, 0.0), ("conv/k", 1.0, 3.0))
    tx, plain = named(name, multipliers=multipliers), {}
    for decay in (0.0, 0.1, 0.3):
        plain[decay] = descended(named(name, weight_decay=decay))
    after = descended(tx)
    np.testing.assert_array_equal(after["head"]["bias"], LAYERS["head"]["bias"])
    np.testing.assert_allclose(
        after["head"]["kernel"] - LAYERS["head"]["kernel"],
        2 * (plain[0.0]["head"]["kernel"] - LAYERS["head"]["kernel"]),
        rtol=1e-3,
        atol=1e-5,
    )
    np.testing.assert_allclose(after["conv"]["kernel"], plain[0.3]["conv"]["kernel"], rtol=1e-5)
    np.testing.assert_allclose(after["conv"]["bias"], plain[0.1]["conv"]["bias"], rtol=1e-5)


def test_a_multiplier_of_no_parameter_is_refused():
    with pytest.raises(resflax.UserError, match=r"'tail' begins no path.*conv, head, norm"):
        named("sgd", multipliers=(("tail", 1.0, 1.0),)).init(dict(sorted(LAYERS.items())))


def test_the_states_of_the_first_optimizers_stay_what_checkpoints_hold():
    for name in ("sgd", "rmsprop"):
        state = named(name).init(LAYERS)
        paths = {
            jax.tree_util.keystr(path[:4], simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(state)
        }
        trace = {f"2/{'0' if name == 'sgd' else '2'}/trace/{layer}" for layer in LAYERS}
        squares = {f"2/0/nu/{layer}" for layer in LAYERS} if name == "rmsprop" else set()
        assert paths == trace | squares | {"2/1/count"}


def test_a_layerwise_optimizer_has_each_layer_by_itself():
    class Described:
        class description:  # noqa: N801
            image_shape = (16, 16, 3)

    names = {}
    for name in ("sgd", "lamb"):
        config = plain_config(**{"optim.name": name, "model.depth": 20, "model.scan": 2})
        model = config_lib.build_model(config, 10)
        tx = optimizers.optimizer(config.optim, lambda step: 0.1)
        parallel = data_parallel("jit")
        state = jax.eval_shape(
            lambda: build.create_state(config, model, Described, tx, parallel)  # noqa: B023
        )
        names[name] = {part for part in state.params if ".." in part}
    assert names["sgd"]
    assert not names["lamb"]


@pytest.mark.long
@pytest.mark.parametrize(
    "fields",
    [
        *({"optim.name": name} for name in OF_OPTAX if name != "sgd"),
        {"optim.clip_adaptive": 0.02, "optim.clip_norm": 1.0},
        {"optim.sam_rho": 0.05, "train.grad_accumulation": 2},
        {"optim.name": "muon", "train.trainable": "stage4|head"},
        {"optim.multipliers": (("stage2", 0.1, 1.0), ("stage3", 0.3, 1.0))},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_a_run_has_the_optimizer_of_its_config_and_resumes(fields, tmp_path):
    rate = {"optim.lr": 0.01, "train.epochs": 2.0}
    result = train.train_and_evaluate(plain_config(**rate, **fields), tmp_path)
    assert np.isfinite(result["eval/loss"])
    longer = plain_config(**rate | {"train.epochs": 3.0}, **fields)
    assert np.isfinite(train.train_and_evaluate(longer, tmp_path)["eval/loss"])
