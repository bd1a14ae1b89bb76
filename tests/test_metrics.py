import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflax import metrics

LOGITS = jnp.asarray([[2.0, 1.0, 0.0], [0.0, 0.0, 5.0], [1.0, 3.0, 2.0]])
LABELS = jnp.asarray([0, 1, 2])


def test_cross_entropy_is_minus_the_log_probability():
    expected = -np.log(jax.nn.softmax(LOGITS))[np.arange(3), LABELS]
    np.testing.assert_allclose(metrics.cross_entropy(LOGITS, LABELS), expected, rtol=1e-6)


def test_label_smoothing_mixes_in_the_mean_over_all_classes():
    log_probabilities = jax.nn.log_softmax(LOGITS)
    hard = -log_probabilities[jnp.arange(3), LABELS]
    expected = 0.9 * hard - 0.1 * log_probabilities.mean(-1)
    np.testing.assert_allclose(metrics.cross_entropy(LOGITS, LABELS, 0.1), expected, rtol=1e-6)


def test_top_k_counts_ranks():
    np.testing.assert_array_equal(metrics.in_top_k(LOGITS, LABELS, 1), [1, 0, 0])
    np.testing.assert_array_equal(metrics.in_top_k(LOGITS, LABELS, 2), [1, 0, 1])
    np.testing.assert_array_equal(metrics.in_top_k(LOGITS, LABELS, 5), [1, 1, 1])


@pytest.mark.parametrize("value", [0.0, jnp.nan, jnp.inf])
def test_logits_that_say_nothing_are_not_right(value):
    constant = jnp.full((3, 3), value)
    np.testing.assert_array_equal(metrics.in_top_k(constant, LABELS, 1), [0, 0, 0])


def test_sums_leave_out_what_is_masked():
    mask = jnp.asarray([1.0, 0.0, 1.0])
    sums = metrics.summed(LOGITS, LABELS, mask)
    parts = [metrics.summed(LOGITS[i : i + 1], LABELS[i : i + 1], jnp.ones(1)) for i in (0, 2)]
    for name, value in sums.items():
        np.testing.assert_allclose(value, sum(part[name] for part in parts), rtol=1e-6)
    assert sums["count"] == 2


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_an_example_with_a_logit_that_is_not_finite_is_no_hit_and_has_no_loss(value):
    logits = LOGITS.at[0, 2].set(value)  # not of the true class
    sums = metrics.summed(logits, LABELS, jnp.ones(3))
    assert jnp.isnan(sums["loss"])
    assert (sums["top1"], sums["top5"]) == (0, 2)
    others = metrics.summed(logits, LABELS, jnp.asarray([0.0, 1.0, 1.0]))
    assert jnp.isfinite(others["loss"])


def test_a_line_leaves_out_the_top_5_of_five_classes():
    evaluation = {"loss": 0.25, "top1": 0.875, "top5": 1.0}
    assert metrics.line(evaluation, 6) == "eval loss 0.2500  top-1 87.50%  top-5 100.00%"
    assert metrics.line(evaluation, 5) == "eval loss 0.2500  top-1 87.50%"
    evaluation["loss"] = float("nan")
    assert metrics.line(evaluation, 5) == "eval loss nan  top-1 87.50%  (logits are not finite)"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_certain_probabilities_are_classes(smoothing):
    logits = jnp.asarray([[1.0, 2.0, 4.0], [0.0, -1.0, 3.0]])
    classes = jnp.asarray([2, 0])
    certain = metrics.cross_entropy(logits, jax.nn.one_hot(classes, 3), smoothing)
    expected = metrics.cross_entropy(logits, classes, smoothing)
    np.testing.assert_allclose(certain, expected, rtol=1e-6)
    even = metrics.cross_entropy(logits, jnp.full((2, 3), 1 / 3), smoothing)
    np.testing.assert_allclose(even, -jax.nn.log_softmax(logits).mean(1), rtol=1e-6)
