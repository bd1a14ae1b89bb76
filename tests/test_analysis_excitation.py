import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflax import metrics
from resflax.analysis import excitation, gates, taps
from resflax.analysis.result import NothingError
from resflax.analysis.subject import untrained
from resflax.models import create_model
from resflax.models.gates import SqueezeExcite

pytestmark = pytest.mark.devices(1, 8, long=8)

CLASSES = 4


def network(**arguments):
    arguments = {"depth": 8, "num_filters": 4, "se_reduction": 2, **arguments}
    model = taps.written_out(create_model("cifar_resnet20", num_classes=CLASSES, **arguments))
    images = 3 * jax.random.normal(jax.random.key(1), (8, 16, 16, 3)) + jnp.arange(8.0).reshape(
        8, 1, 1, 1
    )
    variables = jax.jit(lambda k, x: model.init(k, x, train=False))(jax.random.key(0), images)
    return model, variables, images, jnp.array([0, 0, 1, 1, 1, 3, 3, 0])


def batches(images, labels, size=8):
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size)]


def recorded(model, variables, images):
    apply = taps.recorded(lambda v, x: model.apply(v, x, train=False), gates.select)
    return {name: np.asarray(p.output) for name, p in apply(variables, images)[1].items()}


@pytest.mark.long
@pytest.mark.parametrize("size", [8, 3])
def test_statistics_are_those_of_the_gates(size):
    model, variables, images, labels = network()
    excite = variables["params"]["stage4_block1"]["se"]["excite"]
    excite["kernel"] = excite["kernel"] * 30
    found = gates.measure(model, variables, batches(images, labels, size), CLASSES)
    raw = recorded(model, variables, images)
    assert list(found) == ["stage2_block1", "stage3_block1", "stage4_block1"]
    for name, y in raw.items():
        np.testing.assert_allclose(found[name].mean, y.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(found[name].std, y.std(axis=0), atol=1e-4)
        for label in (0, 1, 3):
            mean = y[np.asarray(labels) == label].mean(axis=0)
            np.testing.assert_allclose(found[name].classes[label], mean, atol=1e-5)
        assert np.isnan(found[name].classes[2]).all()
        assert found[name].closed == pytest.approx((y < 0.01).mean(), abs=1e-6)
        assert found[name].open == pytest.approx((y > 0.99).mean(), abs=1e-6)
    assert found["stage4_block1"].open > 0


@pytest.mark.long
def test_gates_at_every_position_are_averaged():
    model, variables, images, labels = network(se_squeeze="none")
    found = gates.measure(model, variables, batches(images, labels), CLASSES)
    for name, y in recorded(model, variables, images).items():
        assert y.ndim == 4
        np.testing.assert_allclose(found[name].mean, y.mean(axis=(0, 1, 2)), atol=1e-5)
    right = gates.accuracies(model, variables, batches(images, labels), found)
    assert set(right) == {"none", "stage2", "stage3", "stage4", "all"}


@pytest.mark.long
def test_constant_gates_never_move_and_can_be_replaced():
    model, variables, images, labels = network()
    for name, block in variables["params"].items():
        if "block" in name:
            excite = block["se"]["excite"]
            excite["kernel"] = jnp.zeros_like(excite["kernel"])
    found = gates.measure(model, variables, batches(images, labels), CLASSES)
    numbers = [excitation.summary(name, g) for name, g in found.items()]
    assert all(e.still == 1.0 and e.std_images < 1e-3 and e.std_classes < 1e-3 for e in numbers)
    right = gates.accuracies(model, variables, batches(images, labels, 3), found)
    assert len(set(right.values())) == 1


@pytest.mark.long
def test_replacing_none_is_the_evaluation_and_replacing_a_stage_is_a_scale():
    model, variables, images, _ = network()
    # Labels that the network gives, but for two.
    logits = model.apply(variables, images, train=False)
    labels = jnp.argmax(logits, axis=-1).at[:2].add(1) % CLASSES
    found = gates.measure(model, variables, batches(images, labels), CLASSES)
    # Far from the measured, so that it is seen.
    rng = np.random.default_rng(0)
    found = {n: g._replace(mean=rng.normal(0, 3, g.mean.shape)) for n, g in found.items()}
    right = gates.accuracies(model, variables, batches(images, labels, 3), found)
    hits = metrics.in_top_k(logits, labels, 1)
    assert right["none"] == pytest.approx(float(jnp.mean(hits))) == 0.75

    def fixed(module, method):
        chosen = isinstance(module, SqueezeExcite) and method == "gates"
        return module.path[0] if chosen and module.path[0].startswith("stage3") else None

    def replace(name, method, squeezed, channels):
        return jnp.broadcast_to(jnp.float32(found[name].mean), squeezed.shape)

    apply = taps.edited(lambda x: model.apply(variables, x, train=False), fixed, replace)
    hits = metrics.in_top_k(apply(images), labels, 1)
    assert right["stage3"] == pytest.approx(float(jnp.mean(hits)))
    assert right["all"] != right["none"]


def test_stages():
    stages = {
        "stage3_block12": "stage3",
        "stage2/se1": "stage2",
        "mixed_5b": "mixed_5",
        "inception_4e": "inception_4",
        "block_a10": "block_a",
    }
    assert {name: gates.stage(name) for name in stages} == stages


def test_what_has_no_gates_is_said():
    subject = untrained("cifar_resnet20", {"depth": 8, "num_filters": 4}, images=4, size=16)
    with pytest.raises(NothingError, match=r"no squeeze-excite gates; the networks se_\*"):
        excitation.run([subject], argparse.Namespace())


@pytest.mark.long
def test_run(tmp_path):
    subject = untrained(
        "cifar_resnet20", {"depth": 8, "num_filters": 4, "se_reduction": 2}, images=12, size=16
    )
    result = excitation.run([subject], argparse.Namespace())
    assert "top1" not in result.rows[0]
    assert len(result.remarks) == 1
    trained = dataclasses.replace(subject, trained=True)
    result = excitation.run([trained, subject], argparse.Namespace())
    assert [row["top1"] is None for row in result.rows] == [False] * 3 + [True] * 3
    assert len(result.remarks) == 3
    names = [p.name for p in result.write(tmp_path)]
    assert names == ["excitation.csv", "excitation_1.png", "excitation_2.png"]
    panels = result.figures["1"].axes
    assert len(panels) == 4  # three stages, and an empty place
    assert len(panels[0].lines) == 6
    assert (np.diff(panels[0].lines[-1].get_ydata()) >= 0).all()
