"""Tests of what a network loses with its blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflax.analysis import lesion, subject
from resflax.analysis.result import NothingError

pytestmark = pytest.mark.once


def make(depth=14, **overrides):
    network = subject.untrained(
        "cifar_resnet20", {"depth": depth, "num_filters": 4, **overrides}, images=48, size=16
    )
    # A classifier that is not by chance right: the labels are what the network says.
    images = network.normalized(network.images)
    logits = network.model.apply(network.variables, images, train=False)
    return dataclasses.replace(network, labels=np.asarray(logits.argmax(-1), np.int32))


@pytest.fixture(scope="module")
def network():
    return make()


def kept(names, deleted=()):
    return {name: jnp.float32(name not in deleted) for name in names}


BLOCKS = [f"stage{stage}_block{number}" for stage in (2, 3, 4) for number in (1, 2)]


def test_a_lesion_of_nothing_is_the_evaluation(network):
    images, _ = next(network.batches(8))
    logits = jax.jit(lesion.lesioned(network.model))(network.variables, images, kept(BLOCKS))
    expected = network.model.apply(network.variables, images, train=False)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    found = lesion.measure(network.model, network.variables, list(network.batches(20)), draws=1)
    assert found[0].top1 == 1.0


@pytest.mark.parametrize("unit", ["original", "full_preact"])
def test_a_deleted_block_is_one_whose_branch_gives_nothing(unit):
    network = make(unit=unit)
    images, _ = next(network.batches(8))
    name = "stage3_block2"
    params = network.variables["params"]
    block = dict(params[name])
    # Of its last layer nothing is left: the norm's numbers, or the kernel.
    last = "norm2" if unit == "original" else "conv2"
    block[last] = jax.tree.map(jnp.zeros_like, block[last])
    silent = {**network.variables, "params": {**params, name: block}}
    expected = network.model.apply(silent, images, train=False)
    logits = lesion.lesioned(network.model)(network.variables, images, kept(BLOCKS, [name]))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    whole = network.model.apply(network.variables, images, train=False)
    assert np.abs(expected - whole).max() > 1e-3


def test_a_plain_network_without_a_block_passes_its_input_on():
    network = make(shortcut="none")
    images, _ = next(network.batches(8))
    shorter = make(depth=8, shortcut="none")  # a block a stage
    names = {name: network.variables[name] for name in ("params", "batch_stats")}
    seconds = [name for name in BLOCKS if name.endswith("2")]
    rest = {k: {n: v for n, v in tree.items() if n not in seconds} for k, tree in names.items()}
    expected = shorter.model.apply(rest, images, train=False)
    logits = lesion.lesioned(network.model)(network.variables, images, kept(BLOCKS, seconds))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_measure(network):
    found = lesion.measure(network.model, network.variables, list(network.batches(48)), draws=2)
    assert [x.what for x in found if x.lesion == "block"] == BLOCKS
    random = [x for x in found if x.lesion == "blocks"]
    assert [int(x.what) for x in random] == sorted({int(x.what) for x in random})
    assert min(x.top1 for x in found) < 1.0
    # No two of the three stages' blocks have one shape, but for the first stage's.
    (swap,) = (x for x in found if x.lesion == "swaps")
    assert swap.what == "1"
    assert swap.tau < 1.0
    # Accuracies are means over all batches, whatever their sizes.
    parts = lesion.measure(network.model, network.variables, list(network.batches(36)), draws=2)
    assert [x.top1 for x in parts] == pytest.approx([x.top1 for x in found])


def test_rates_of_stochastic_depth_stand_beside_the_drops():
    network = make(drop_path=0.5)
    found = lesion.measure(network.model, network.variables, list(network.batches(48)), draws=1)
    rates = [x.drop_rate for x in found if x.lesion == "block"]
    np.testing.assert_allclose(rates, np.arange(1, 7) / 6 * 0.5)
    assert "stochastic depth" in lesion.verdict(found)[1]


def test_a_network_without_residual_blocks_is_refused():
    network = subject.untrained("densenet121", {}, images=2, size=64)
    with pytest.raises(NothingError, match="residual blocks"):
        lesion.measure(network.model, network.variables, list(network.batches(2)))


def test_verdict():
    found = [lesion.Lesion("none", "nothing", 0.9)]
    found += [lesion.Lesion("block", f"stage2_block{i}", 0.9 - 0.1 * i) for i in (1, 2)]
    found += [lesion.Lesion("block", "stage3_block1", 0.4)]
    (said,) = lesion.verdict(found)
    assert "stage2 15.0, stage3 50.0 points" in said
    assert "most without stage3_block1, to 40.0%" in said
