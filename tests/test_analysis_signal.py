"""Tests of what passes through a network, against arithmetic and derivatives by hand."""

import csv
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resflax import analyze, metrics
from resflax.analysis import signal, subject, taps
from resflax.models import create_model

pytestmark = pytest.mark.devices(1, 8, long=8)


def make(seed=0, depth=20, **overrides):
    return subject.untrained(
        "cifar_resnet20",
        {"depth": depth, "num_filters": 4, **overrides},
        images=8,
        seed=seed,
        size=16,
    )


def measured(network, variables=None):
    images, labels = next(network.batches(8))
    return signal.meter(network.model)(variables or network.variables, images, labels)


def changes(signals):
    """Of the gradient, on its way back through the equal blocks of the first stage."""
    found = {s.block: s.gradient for s in signals}
    names = [n for n in found if n.startswith("stage2") and n != "stage2_block1"]
    return [found[a] / found[b] for a, b in itertools.pairwise(names)]


def without_branches(variables):
    """The last norm of every branch gives zeros."""

    def clear(path, leaf):
        names = [key.key for key in path]
        last = "shortcut" not in names and "norm2" in names
        return jnp.zeros_like(leaf) if last else leaf

    return {**variables, "params": jax.tree_util.tree_map_with_path(clear, variables["params"])}


@pytest.mark.long
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_scaled_shortcut_carries_its_scale_to_the_power_of_the_blocks(scale):
    network = make(
        depth=32, shortcut="A", unit="full_preact", skip="constant_scaling", skip_scale=scale,
        first_act="block",
    )  # fmt: skip
    signals = measured(network, without_branches(network.variables))
    np.testing.assert_allclose(changes(signals), scale, rtol=1e-5)


@pytest.mark.long
def test_a_sigmoid_plain_net_vanishes_and_shortcuts_and_norms_prevent_it():
    plain = measured(make(shortcut="none", norm="none", act="sigmoid"))
    residual = measured(make(shortcut="B", act="sigmoid", unit="full_preact"))
    assert "vanishes" in signal.verdict(plain)
    assert "is healthy" in signal.verdict(residual)


@pytest.mark.long
def test_gradients_are_those_of_the_rest_of_the_network():
    """The block's input is replaced by hand, and the rest differentiated with respect to it."""
    network = make(depth=8)
    images, labels = next(network.batches(8))
    apply = functools.partial(network.model.apply, train=True, mutable=["batch_stats"])
    _, passed = taps.recorded(apply, taps.parts)(network.variables, images)

    def rest(x):
        def replaced(name, method, inputs, *others):
            return method(x if name == "stage3_block1" else inputs, *others)

        logits, _ = taps.edited(apply, taps.parts, replaced)(network.variables, images)
        return metrics.cross_entropy(logits, labels).sum()

    gradient = jax.grad(rest)(passed["stage3_block1"].input)
    expected = np.linalg.norm(np.asarray(gradient).reshape(8, -1), axis=1).mean()
    found = {s.block: s for s in measured(network)}
    assert found["stage3_block1"].gradient == pytest.approx(expected, rel=1e-5)
    output = np.asarray(passed["stage2_block1"].output)
    assert found["stage2_block1"].mean == pytest.approx(output.mean(), rel=1e-5)
    assert found["stage2_block1"].variance == pytest.approx(output.var(), rel=1e-4)
    norms = np.linalg.norm(output.reshape(8, -1), axis=1)
    assert found["stage2_block1"].norm == pytest.approx(norms.mean(), rel=1e-5)


@pytest.mark.long
def test_a_gradient_agrees_with_finite_differences():
    network = make(depth=8, act="tanh")
    images, labels = next(network.batches(8))
    apply = functools.partial(network.model.apply, train=True, mutable=["batch_stats"])

    @jax.jit
    def loss(step, direction):
        def shifted(name, method, x, *others):
            return method(x + step * direction if name == "stage2_block1" else x, *others)

        logits, _ = taps.edited(apply, taps.parts, shifted)(network.variables, images)
        return metrics.cross_entropy(logits, labels).sum()

    shape = taps.shapes(apply, taps.parts)(network.variables, images)["stage2_block1"].input.shape
    zero = jnp.zeros(shape)
    gradient = jax.grad(lambda d: loss(1.0, d))(zero)
    direction = gradient / jnp.linalg.norm(gradient)
    difference = (loss(1e-2, direction) - loss(-1e-2, direction)) / 2e-2
    assert difference == pytest.approx(float(jnp.linalg.norm(gradient)), rel=1e-2)
    found = {s.block: s.gradient for s in measured(network)}["stage2_block1"]
    norms = jnp.linalg.norm(gradient.reshape(8, -1), axis=1)
    assert found == pytest.approx(float(norms.mean()), rel=1e-4)


@pytest.mark.long
def test_clipping_scales_the_gradients_of_all_parameters_alike():
    network = make(depth=8)
    images, labels = next(network.batches(8))

    def loss(params):
        variables = {**network.variables, "params": params}
        logits, _ = network.model.apply(variables, images, train=True, mutable=["batch_stats"])
        return metrics.cross_entropy(logits, labels).mean()

    gradient = jax.grad(loss)(network.variables["params"])
    measure = signal.meter(network.model)
    whole = float(optax.tree.norm(gradient))
    for limit in (math.inf, 2 * whole, 0.1 * whole):
        clip = optax.clip_by_global_norm(limit)
        clipped, _ = clip.update(gradient, clip.init(gradient))
        for s in measure(network.variables, images, labels, limit):
            expected = float(optax.tree.norm(clipped[s.block]))
            assert s.parameters == pytest.approx(expected, rel=1e-4)


@pytest.mark.long
def test_limits_of_the_gradient_are_lines_of_their_own(tmp_path, capsys):
    command = ["signal", "--model", "cifar_resnet20", "--set", "depth=8", "--size", "16"]
    command += ["--images", "4", "--out", str(tmp_path), "--clip-norm"]
    assert analyze.main([*command, "inf,0.01"]) == 0
    with (tmp_path / "signal.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [row["network"] for row in rows]
    assert set(names) == {name := "cifar_resnet20 depth=8", f"{name}, clipped to 0.01"}
    first, last = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    ratios = [
        float(b["parameters"]) / float(a["parameters"]) for a, b in zip(first, last, strict=True)
    ]
    assert max(ratios) < 0.1
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-4)
    for limits in ("0", "a", "nan", "1,-1"):
        with pytest.raises(SystemExit):
            analyze.main([*command, limits])
        assert "must be positive numbers" in capsys.readouterr().err


@pytest.mark.long
def test_blocks_come_in_order_whatever_their_names():
    names = [s.block for s in measured(make(depth=8))]
    assert names == ["stem", "stage2_block1", "stage3_block1", "stage4_block1"]


@pytest.mark.parametrize(
    ("values", "factor"),
    [([1.0, 2.0, 4.0], 2.0), ([3.0], 1.0), ([1.0, 0.0], 0.0), ([1.0, math.inf], math.nan)],
)
def test_factor(values, factor):
    assert signal.factor(values) == pytest.approx(factor, nan_ok=True)


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["vgg11", "googlenet", "densenet121"])
def test_the_parts_of_other_families(name):
    model = create_model(name)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), images
    )
    apply = functools.partial(model.apply, train=False)
    found = taps.shapes(apply, taps.parts)(variables, images)
    assert "head" not in found
    assert {n for n in found if not n.startswith("pool")} <= set(variables["params"])
    assert len(found) > 5
