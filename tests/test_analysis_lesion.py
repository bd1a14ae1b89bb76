"""Tests of what a network loses with its blocks."""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflax.analysis import lesion, lesions, order, subject
from resflax.analysis.result import NothingError
from resflax.models import create_model

pytestmark = pytest.mark.devices(1, 8, long=8)


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


@pytest.mark.long
def test_a_lesion_of_nothing_is_the_evaluation(network):
    images, _ = next(network.batches(8))
    logits = jax.jit(lesions.lesioned(network.model))(network.variables, images, kept(BLOCKS))
    expected = network.model.apply(network.variables, images, train=False)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    found = lesions.measure(network.model, network.variables, list(network.batches(20)), draws=1)
    assert found[0].top1 == 1.0


@pytest.mark.long
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
    logits = lesions.lesioned(network.model)(network.variables, images, kept(BLOCKS, [name]))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    whole = network.model.apply(network.variables, images, train=False)
    assert np.abs(expected - whole).max() > 1e-3


@pytest.mark.long
def test_a_plain_network_without_a_block_passes_its_input_on():
    network = make(shortcut="none")
    images, _ = next(network.batches(8))
    shorter = make(depth=8, shortcut="none")  # a block a stage
    names = {name: network.variables[name] for name in ("params", "batch_stats")}
    seconds = [name for name in BLOCKS if name.endswith("2")]
    rest = {k: {n: v for n, v in tree.items() if n not in seconds} for k, tree in names.items()}
    expected = shorter.model.apply(rest, images, train=False)
    logits = lesions.lesioned(network.model)(network.variables, images, kept(BLOCKS, seconds))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.long
def test_measure(network):
    found = lesions.measure(network.model, network.variables, list(network.batches(48)), draws=2)
    assert [x.what for x in found if x.lesion == "block"] == BLOCKS
    random = [x for x in found if x.lesion == "blocks"]
    assert [int(x.what) for x in random] == sorted({int(x.what) for x in random})
    assert min(x.top1 for x in found) < 1.0
    # No two of the three stages' blocks have one shape, but for the first stage's.
    (swap,) = (x for x in found if x.lesion == "swaps")
    assert swap.what == "1"
    assert swap.tau < 1.0


@pytest.mark.long
def test_accuracies_are_means_over_all_batches_whatever_their_sizes(network):
    found = lesions.measure(network.model, network.variables, list(network.batches(48)), draws=2)
    parts = lesions.measure(network.model, network.variables, list(network.batches(36)), draws=2)
    assert [x.top1 for x in parts] == pytest.approx([x.top1 for x in found])


@pytest.mark.long
def test_rates_of_stochastic_depth_stand_beside_the_drops():
    network = make(drop_path=0.5)
    found = lesions.measure(network.model, network.variables, list(network.batches(48)), draws=1)
    rates = [x.drop_rate for x in found if x.lesion == "block"]
    np.testing.assert_allclose(rates, np.arange(1, 7) / 6 * 0.5)
    assert "stochastic depth" in lesion.verdict(found)[1]


@pytest.mark.long
def test_a_network_without_residual_blocks_is_refused():
    model = create_model("densenet121", num_classes=10)
    images = jnp.zeros((2, 64, 64, 3))
    # Shapes are enough to be refused.
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), images)
    with pytest.raises(NothingError, match="residual blocks") as caught:
        lesions.measure(model, variables, [(images, jnp.zeros(2, jnp.int32))])
    assert not any(name.startswith("inception") for name in str(caught.value).split())


@pytest.mark.long
def test_a_plain_block_behind_a_wide_stem_can_be_deleted():
    network = make(depth=8, shortcut="none", stem_filters=16)
    images, _ = next(network.batches(4))
    first = ["stage2_block1"]
    names = [f"stage{stage}_block1" for stage in (2, 3, 4)]
    logits = lesions.lesioned(network.model)(network.variables, images, kept(names, first))
    assert np.isfinite(logits).all()


# In a whole run these numbers would take a network of 54 blocks.
def test_numbers_of_blocks_begin_with_one():
    assert [lesions._numbers(most) for most in (0, 1, 2)] == [[], [1], [1]]
    for most in (5, 9, 16, 54):
        numbers = lesions._numbers(most)
        assert numbers[0] == 1
        assert numbers[-1] == most - 1
        assert len(numbers) <= 6


@pytest.mark.parametrize("drops", [[0.1, 0.1, 0.1], [0.1, 0.3, 0.2]])
def test_equal_drops_have_no_rank_correlation(drops):
    found = [lesions.Lesion("none", "nothing", 0.9)]
    for i, drop in enumerate(drops, 1):
        found.append(lesions.Lesion("block", f"stage2_block{i}", 0.9 - drop, drop_rate=0.1 * i))
    said = lesion.verdict(found)
    assert len(said) == (1 if len(set(drops)) == 1 else 2)
    assert "nan" not in " ".join(said)


# The figure has them as lines of several panels; which belong together is known before.
def test_lines_end_with_the_stages_of_deleted_blocks():
    deleted = [lesions.Lesion("block", name, 0.5) for name in BLOCKS]
    assert [x for x, _, _ in lesion._pieces(range(1, 7), deleted)] == [[1, 2], [3, 4], [5, 6]]
    random = [lesions.Lesion("blocks", str(i), 0.5, 0.1) for i in (1, 3, 5)]
    assert [(x, e) for x, _, e in lesion._pieces([1, 3, 5], random)] == [([1, 3, 5], [10.0] * 3)]


@pytest.mark.long
def test_swapped_blocks_have_each_others_parameters_and_statistics(network):
    names = list(BLOCKS)
    (pair,) = order.exchangeable(network.variables["params"], names)
    a, b = pair
    moved = order.swapped(names, [pair], 1, np.random.default_rng(0))
    assert order.tau(names, names) == pytest.approx(1.0)
    assert order.tau(names, moved) == pytest.approx(1 - 2 / 15)
    permuted = order.permuted(network.variables, names, moved)
    for kind in ("params", "batch_stats"):
        old, new = network.variables[kind], permuted[kind]
        assert new[a] is old[b]
        assert new[b] is old[a]
        assert all(new[n] is old[n] for n in old if n not in pair)
    images, _ = next(network.batches(8))
    logits = jax.jit(lesions.lesioned(network.model))
    whole, other = (logits(v, images, kept(BLOCKS)) for v in (network.variables, permuted))
    assert np.abs(whole - other).max() > 1e-3


@pytest.mark.parametrize("text", ["0", "-1"])
def test_no_draws_are_refused(text):
    parser = argparse.ArgumentParser(exit_on_error=False)
    lesion.add_arguments(parser)
    with pytest.raises(argparse.ArgumentError, match="at least 1"):
        parser.parse_args([f"--draws={text}"])


def test_verdict():
    found = [lesions.Lesion("none", "nothing", 0.9)]
    found += [lesions.Lesion("block", f"stage2_block{i}", 0.9 - 0.1 * i) for i in (1, 2)]
    found += [lesions.Lesion("block", "stage3_block1", 0.4)]
    (said,) = lesion.verdict(found)
    assert "stage2 15.0, stage3 50.0 points" in said
    assert "most without stage3_block1, to 40.0%" in said
