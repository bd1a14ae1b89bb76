"""Losses, by their definitions and beside timm's and torch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plain import config as plain_config
from test_steps import BATCH, Scale

import resflax
from resflax import losses, steps, train
from resflax.interop import peers
from resflax.train_state import create_train_state

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(0, 3, (6, 5)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(5, size=6))
MIXED = jnp.asarray(RNG.dirichlet(np.ones(5), 6), jnp.float32)
EXTREME = jnp.asarray([[200.0, 0, 0, 0, 0], [-200.0, 0, 0, 0, 0]])


def teacher(*_):
    return lambda variables, images: images[:, 0, 0, :] * variables["scale"], {
        "scale": np.ones((1, 5))
    }


def made(name, label_smoothing=0.0, **fields):
    config = {"name": name, name: fields}
    return losses.of(config, label_smoothing=label_smoothing, load_teacher=teacher)


FIELDS = {
    "cross_entropy": {},
    "binary": {"threshold": 0.2},
    "focal": {"gamma": 0.5},
    "distillation": {"teacher": "t"},
}


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("logits", [LOGITS, EXTREME], ids=["logits", "extreme"])
@pytest.mark.parametrize("targets", [LABELS, MIXED], ids=["labels", "mixed"])
def test_every_loss_is_a_number_per_example_with_a_finite_gradient(name, logits, targets):
    images = jnp.ones((len(logits), 1, 1, 5))
    loss = losses.checked(losses.on(made(name, **FIELDS[name]), images))
    value = loss(logits, targets[: len(logits)])
    assert value.shape == logits.shape[:1]
    assert value.dtype == jnp.float32
    gradient = jax.grad(lambda x: loss(x, targets[: len(logits)]).sum())(logits)
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("sum_classes", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.2])
@pytest.mark.parametrize("targets", [LABELS, MIXED], ids=["labels", "mixed"])
def test_binary_is_timms(sum_classes, threshold, targets):
    torch = pytest.importorskip("torch")
    theirs = peers.load("timm.loss").BinaryCrossEntropy(
        smoothing=0.1, target_threshold=threshold, sum_classes=sum_classes
    )
    # timm leaves mixed targets to its own mixing, which smooths them before.
    given = targets if targets.ndim == 1 else 0.9 * targets + 0.1 / 5
    expected = theirs(torch.tensor(np.asarray(LOGITS)), torch.tensor(np.asarray(given)))
    ours = made("binary", 0.1, threshold=threshold, sum_classes=sum_classes)
    np.testing.assert_allclose(ours(LOGITS, targets).mean(), expected.numpy(), rtol=1e-5)


def test_binary_is_the_sum_over_classes_of_their_own_cross_entropies():
    p = jax.nn.sigmoid(LOGITS)
    each = -np.where(MIXED > 0.2, np.log(p), np.log(1 - p))
    loss = made("binary", threshold=0.2, sum_classes=True)
    np.testing.assert_allclose(loss(LOGITS, MIXED), each.sum(-1), rtol=1e-4)
    np.testing.assert_allclose(
        made("binary", threshold=0.2)(LOGITS, MIXED), each.mean(-1), rtol=1e-4
    )


def test_focal_weighs_by_what_is_missing():
    p = jax.nn.softmax(LOGITS)[jnp.arange(6), LABELS]
    loss = made("focal", gamma=2.0)
    np.testing.assert_allclose(loss(LOGITS, LABELS), -((1 - p) ** 2) * np.log(p), rtol=1e-4)
    mean = sum(MIXED[:, k] * loss(LOGITS, jnp.full(6, k)) for k in range(5))
    np.testing.assert_allclose(loss(LOGITS, MIXED), mean, rtol=1e-4)
    plain = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS)
    np.testing.assert_allclose(made("focal", gamma=0.0)(LOGITS, LABELS), plain, rtol=1e-5)


def test_distillation_is_the_distance_to_the_teacher_beside_the_targets():
    images = jnp.asarray(RNG.normal(0, 3, (6, 1, 1, 5)), jnp.float32)
    taught, own = (jax.nn.softmax(x / 3.0) for x in (images[:, 0, 0], LOGITS))
    distance = 9 * (taught * np.log(taught / own)).sum(-1)
    hard = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS)
    loss = made("distillation", teacher="t", temperature=3.0, weight=0.25).on(images)
    np.testing.assert_allclose(loss(LOGITS, LABELS), 0.75 * hard + 0.25 * distance, rtol=1e-4)
    alone = made("distillation", teacher="t", weight=1.0).on(images)
    np.testing.assert_allclose(alone(images[:, 0, 0], LABELS), 0.0, atol=1e-5)
    torch = pytest.importorskip("torch")
    kl = torch.nn.functional.kl_div(
        *(torch.tensor(np.log(p)) for p in (own, taught)), reduction="none", log_target=True
    )
    np.testing.assert_allclose(9 * kl.sum(-1), distance, rtol=1e-4)


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda logits, targets: jnp.mean(logits), r"float32 \[\] for logits \[4, 2\]"),
        (lambda logits, targets: logits, r"float32 \[4, 2\]"),
        (lambda logits, targets: targets, r"int32 \[4\]"),
        (lambda logits, targets: (logits, targets), "tuple"),
    ],
)
def test_a_loss_of_another_shape_is_refused_before_a_step(loss, found):
    state = create_train_state(Scale(), optax.sgd(0.5), (2, 2, 1), seed=0, ema=False)
    step = functools.partial(steps.train_step, axis_name=None, augment=lambda keys, x: x)
    with pytest.raises(resflax.UserError, match=rf"the loss gives {found}.*example, \[4\]"):
        jax.jit(functools.partial(step, loss=loss))(state, BATCH)


RUN = {"train.epochs": 1.0, "train.label_smoothing": 0.0}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    train.train_and_evaluate(plain_config(**RUN, **{"model.num_filters": 8}), workdir)
    return workdir


@pytest.mark.long
@pytest.mark.parametrize("name", ["binary", "focal"])
def test_a_run_has_the_loss_of_its_config(name, tmp_path):
    config = plain_config(**RUN, **{"loss.name": name})
    assert np.isfinite(train.train_and_evaluate(config, tmp_path)["eval/loss"])


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "steps_per_call"), [("jit", 2), ("shard_map", 1), ("shard_map", 2), ("pmap", 1)]
)
@pytest.mark.devices(1, 8)
def test_a_student_learns_from_a_run_whose_weights_are_no_part_of_it(
    mode, steps_per_call, taught, tmp_path
):
    config = plain_config(
        **RUN,
        **{
            "parallel.mode": mode,
            "model.bn_axis": "global",
            "train.steps_per_call": steps_per_call,
            "train.grad_accumulation": 2,
            "loss.name": "distillation",
            "loss.distillation.teacher": str(taught),
        },
    )
    train.train_and_evaluate(config, tmp_path / "run")
    student = resflax.restore(tmp_path / "run")
    assert student.variables["params"]["head"]["kernel"].shape == (16, 10)


def test_a_teacher_does_not_learn():
    def loss_of(weights):
        hard = losses.cross_entropy(label_smoothing=0.0)
        taught = losses.Distillation(lambda v, x: x @ v, weights, hard, 2.0, 0.5)
        return jnp.sum(losses.on(taught, jnp.eye(3))(jnp.ones((3, 3)), jnp.arange(3)))

    weights = jnp.arange(9.0).reshape(3, 3)
    assert loss_of(weights) != loss_of(0 * weights)
    np.testing.assert_array_equal(jax.grad(loss_of)(weights), 0)
