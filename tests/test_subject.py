"""Tests of what is analysed: the networks, their images, and how both are chosen."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import resflax
from resflax.analysis import subject
from resflax.data import sources

TINY = {"depth": 8, "num_filters": 4}


def untrained(**options):
    return subject.untrained("cifar_resnet20", TINY, **{"images": 6, "size": 16, **options})


@pytest.fixture(scope="module")
def one():
    return untrained()


def numbered(total):
    """A subject whose images tell their numbers."""
    images = np.arange(total, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    description = sources.Description("numbers", (2, 2, 1), ("a",), (0.5,), (0.25,))
    labels = np.arange(total, dtype=np.int32)
    return subject.Subject("numbers", None, dict, images, labels, description, trained=False)


def test_an_untrained_network_has_rendered_shapes_and_its_name(one):
    assert one.name == "cifar_resnet20 depth=8, num_filters=4"
    assert not one.trained
    assert (one.images.shape, one.images.dtype) == ((6, 16, 16, 3), np.uint8)
    assert (one.labels.shape, one.labels.dtype) == ((6,), np.int32)
    assert (one.description.name, one.description.num_classes) == ("shapes", 10)
    assert one.image_shape == (16, 16, 3)
    assert (one.model.num_classes, one.model.scan, one.model.remat) == (10, 0, False)
    assert subject.untrained("cifar_resnet20", {}, images=2, size=16).name == "cifar_resnet20"


def test_the_multiply_adds_are_those_of_one_image(one):
    assert one.macs == resflax.count(one.model, (16, 16, 3)).macs > 0


@pytest.mark.parametrize(("name", "side"), [("cifar_resnet20", 32), ("alexnet", 227)])
def test_images_are_of_the_size_that_the_network_was_published_on(name, side):
    assert subject.untrained(name, {}, images=1).image_shape == (side, side, 3)


def test_the_running_statistics_are_those_of_the_images(one):
    kernel = one.variables["params"]["stem"]["conv"]["kernel"]
    dimensions = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        one.normalized(one.images), kernel, (1, 1), "SAME", dimension_numbers=dimensions
    )
    statistics = one.variables["batch_stats"]["stem"]["norm"]
    np.testing.assert_allclose(statistics["mean"], x.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(statistics["var"], x.var((0, 1, 2)), rtol=1e-3)


def test_another_seed_gives_other_parameters_for_the_same_images(one):
    other = untrained(seed=1)
    np.testing.assert_array_equal(other.images, one.images)
    kernels = [s.variables["params"]["head"]["kernel"] for s in (one, other)]
    assert not np.array_equal(*kernels)


def test_variables_are_made_when_they_are_needed_and_once():
    made = []

    def make():
        made.append({"params": {}})
        return made[-1]

    found = dataclasses.replace(numbered(1), make_variables=make)
    assert made == []
    assert found.variables is found.variables
    assert len(made) == 1


def test_a_grid_has_every_combination_of_values_with_the_same_images():
    values = {"depth": [8, 14], "shortcut": ["A", "none"]}
    found = subject.grid("cifar_resnet20", values, images=2, size=16)
    assert [s.name for s in found] == [
        f"cifar_resnet20 depth={depth}, shortcut={shortcut}"
        for depth in (8, 14)
        for shortcut in ("A", "none")
    ]
    assert [(sum(s.model.stage_sizes), s.model.shortcut) for s in found] == [
        *((3, "A"), (3, "none"), (6, "A"), (6, "none"))
    ]
    assert all(s.images is found[0].images for s in found)


def test_of_a_larger_test_set_images_are_drawn_from_the_first_to_the_last():
    data = {"shapes.num_train": 10, "shapes.num_test": 10}
    whole, some, more = (untrained(images=n, data=data) for n in (10, 3, 100))
    np.testing.assert_array_equal(some.images, whole.images[[0, 3, 6]])
    np.testing.assert_array_equal(some.labels, whole.labels[[0, 3, 6]])
    np.testing.assert_array_equal(more.images, whole.images)


def test_a_directory_of_classes_can_be_looked_at_whole(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / name / f"{i}.png")
    data = {"source": "folder", "folder.path": str(tmp_path)}
    counts = {
        share: len(untrained(images=100, data={**data, "folder.val_share": share}).images)
        for share in (1, 0.25)
    }
    assert counts == {1: 8, 0.25: 2}


def test_normalized_images_have_the_training_images_mean_and_deviation_taken_off():
    found = numbered(256)
    expected = (found.images / np.float32(255) - 0.5) / 0.25
    np.testing.assert_allclose(found.normalized(found.images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("most", "batches"),
    [
        (None, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
        (100, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
        (5, [[0, 2, 4, 6], [8]]),
        (3, [[0, 3, 6]]),
    ],
)
def test_batches_are_of_all_images_or_of_some_drawn_evenly(most, batches):
    found = numbered(10)
    drawn = list(found.batches(4, most))
    assert [labels.tolist() for _, labels in drawn] == batches
    for images, labels in drawn:
        np.testing.assert_array_equal(images, found.normalized(found.images[np.asarray(labels)]))
