"""Tests of the loss along random directions."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflax import figures, metrics
from resflax.analysis import landscape, subject

pytestmark = pytest.mark.devices(1, 8, long=8)


@pytest.fixture(scope="module")
def network():
    return subject.untrained("cifar_resnet20", {"depth": 8, "num_filters": 4}, images=16, size=16)


def loss_of(network, params, images, labels):
    logits = network.model.apply({**network.variables, "params": params}, images, train=False)
    return metrics.cross_entropy(logits, labels).mean()


@pytest.mark.long
def test_filters_of_a_direction_have_the_norms_of_the_networks(network):
    params = network.variables["params"]
    found = landscape.direction(params, 0)
    kernel, d = (tree["stage3_block1"]["conv1"]["kernel"] for tree in (params, found))
    axes = (0, 1, 2)
    norms = [np.linalg.norm(np.asarray(x).reshape(-1, x.shape[-1]), axis=0) for x in (kernel, d)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    assert np.std(norms[0]) > 0
    assert not np.allclose(np.asarray(d).mean(axes), np.asarray(kernel).mean(axes))
    assert all(not leaf.any() for leaf in jax.tree.leaves(found) if leaf.ndim == 1)
    other = landscape.direction(params, 1)["stage3_block1"]["conv1"]["kernel"]
    correlation = np.corrcoef(np.asarray(d).ravel(), np.asarray(other).ravel())[0, 1]
    assert abs(correlation) < 0.2


@pytest.mark.long
def test_the_loss_of_a_point_is_that_of_the_moved_parameters(network):
    images, labels = next(network.batches(8))
    params = network.variables["params"]
    points = landscape.measure(
        network.model, network.variables, images, labels, [(0.0, 0.0), (0.5, 0.0), (0.5, -1.0)],
        seed=3,
    )  # fmt: skip
    d, e = (landscape.direction(params, seed) for seed in (6, 7))
    for point in points:
        moved = jax.tree.map(lambda w, d, e, p=point: w + p.a * d + p.b * e, params, d, e)
        assert point.loss == pytest.approx(float(loss_of(network, moved, images, labels)), rel=1e-4)
    here = float(loss_of(network, params, images, labels))
    assert points[0].loss == pytest.approx(here, rel=1e-5)
    assert points[0].loss != pytest.approx(points[1].loss, rel=1e-2)


@pytest.mark.long
def test_run_draws_a_line_and_a_plane(network):
    options = argparse.Namespace(points=5, grid=3, seed=0, images=None)
    result = landscape.run([network], options)
    assert len(result.rows) == 5 + 9
    assert set(result.figures) == {"", "plane"}
    middle = [row["loss"] for row in result.rows if row["a"] == row["b"] == 0]
    assert middle == pytest.approx([middle[0]] * 2)
    without = landscape.run([network], argparse.Namespace(points=5, grid=0, seed=0, images=None))
    assert set(without.figures) == {""}


def test_losses_that_are_not_finite_can_be_drawn():
    points = [landscape.Point(a, b, jnp.inf if a else 1.0) for b in (-1, 0, 1) for a in (-1, 0, 1)]
    landscape.draw_planes({"x": points})
    assert "0.5" in landscape.verdict(
        [landscape.Point(-0.5, 0, np.nan), landscape.Point(0, 0, 1.0), landscape.Point(1, 0, 1.1)]
    )


def test_a_plane_of_losses_none_of_which_is_finite_can_be_drawn():
    points = [landscape.Point(a, b, np.nan) for b in (-1, 0, 1) for a in (-1, 0, 1)]
    assert len(landscape.draw_planes({"x": points}).axes) == 2


def test_images_are_drawn_evenly(network):
    # As in a folder of classes: sorted by class. A run tells only the loss of what it has drawn.
    labels = np.repeat(np.arange(4, dtype=np.int32), 4)
    ordered = dataclasses.replace(network, labels=labels)
    images, drawn = landscape._batch(ordered, 10**9, None)
    assert images.shape == (4, 16, 16, 3)
    assert drawn.tolist() == [0, 1, 2, 3]
    # However many points there are.
    assert landscape._batch(ordered, 10**9, 8)[1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_single_plane_fills_its_figure():
    points = [landscape.Point(a, b, 1.0 + a * a) for b in (-1, 0, 1) for a in (-1, 0, 1)]
    one, two = (landscape.draw_planes(dict.fromkeys(names, points)) for names in ("x", "xy"))
    assert one.get_figwidth() == figures.COLUMN
    assert two.get_figwidth() == figures.PAGE


def test_decades_have_labels_of_one_kind():
    points = [landscape.Point(a, 0.0, 10.0 ** (8 * abs(a))) for a in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    figure = landscape.draw({"x": points})
    figure.draw_without_rendering()
    axis = figure.axes[0].yaxis
    assert not any(label.get_text() for label in axis.get_ticklabels(minor=True))
    shown = [label.get_text() for label in axis.get_ticklabels() if label.get_text()]
    assert all("10^" in label for label in shown)


def parse(*arguments):
    parser = argparse.ArgumentParser(exit_on_error=False)
    landscape.add_arguments(parser)
    return parser.parse_args(arguments)


def test_no_plane_but_no_missing_line():
    assert parse("--grid", "0").grid == 0
    with pytest.raises(argparse.ArgumentError, match="at least 3"):
        parse("--points", "0")


@pytest.mark.parametrize("text", ["2", "1", "-3"])
def test_points_without_a_middle_are_refused(text):
    for flag in ("--points", "--grid"):
        with pytest.raises(argparse.ArgumentError, match="odd"):
            parse(flag, text)
