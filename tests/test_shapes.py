"""Tests of the procedural shapes data set."""

import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from resflax.data import shapes

DIFFICULTIES = (0.0, 0.3, 1.0)


def test_image_depends_on_its_index_only() -> None:
    images, labels = shapes.render(range(40), seed=3)
    again, _ = shapes.render(range(40), seed=3)
    # Neither sorted nor contiguous, so a generator shared along the call would be seen.
    subset = [31, 2, 17]
    some_images, some_labels = shapes.render(subset, seed=3)
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(some_images, images[subset])
    np.testing.assert_array_equal(some_labels, labels[subset])


def test_seed_and_index_both_matter() -> None:
    images, _ = shapes.render(range(0, 200, 10), seed=0)
    other, _ = shapes.render(range(0, 200, 10), seed=1)
    # All of one class, so a repeated pose could not hide behind different labels.
    drawn = np.concatenate([images, other]).reshape(40, -1)
    assert len(np.unique(drawn, axis=0)) == 40


# The smallest size, the usual one, and an odd one.
@pytest.mark.parametrize("size", [16, 32, 47])
def test_shapes_and_dtypes(size: int) -> None:
    images, labels = shapes.render(range(5, 12), seed=0, size=size)
    assert images.shape == (7, size, size, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (7,)
    assert labels.dtype == np.int32


def test_no_indices_give_an_empty_set() -> None:
    images, labels = shapes.render([], seed=0)
    assert images.shape == (0, 32, 32, 3)
    assert labels.shape == (0,)


def test_labels_are_balanced() -> None:
    _, labels = shapes.render(range(200), seed=0)
    assert len(shapes.LABEL_NAMES) == 10
    np.testing.assert_array_equal(np.bincount(labels), [20] * 10)


def _mask(name: str, angle: float) -> np.ndarray:
    """Pixels [101, 101] inside a rotated shape at unit scale."""
    y, x = np.mgrid[-1.2:1.2:101j, -1.2:1.2:101j]
    cos, sin = np.cos(angle), np.sin(angle)
    return shapes.SHAPES[name](cos * x + sin * y, cos * y - sin * x) < 0


@pytest.mark.parametrize("name", shapes.LABEL_NAMES)
def test_shape_fits_the_unit_disc(name: str) -> None:
    y, x = np.mgrid[-1.2:1.2:101j, -1.2:1.2:101j]
    reach = np.hypot(x, y)[_mask(name, 0.0)].max()
    # Beyond 1 the image border would cut it; far below, it would be drawn too small.
    assert 0.85 < reach <= 1.0


def test_no_shape_is_a_rotated_copy_of_another() -> None:
    turned = {
        name: np.stack([_mask(name, angle) for angle in np.linspace(0, 2 * np.pi, 72)])
        for name in shapes.LABEL_NAMES
    }
    for i, first in enumerate(shapes.LABEL_NAMES):
        upright = turned[first][0]
        for second in shapes.LABEL_NAMES[i + 1 :]:
            overlap = (upright & turned[second]).sum((1, 2)) / (upright | turned[second]).sum(
                (1, 2)
            )
            # A copy overlaps by more than 0.95; the closest pair, disc and square, by 0.76.
            assert overlap.max() < 0.8, (first, second)


@pytest.mark.first(1)
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_mean_color_does_not_tell_the_class(difficulty: float) -> None:
    images, labels = shapes.render(range(2000), seed=0, difficulty=difficulty)
    colors = images.mean((1, 2)) / 255
    means = np.stack([colors[labels == label].mean(0) for label in range(10)])
    # 200 images a class: the standard error is about 0.02.
    np.testing.assert_allclose(means, 0.5, atol=0.08)


@pytest.mark.long
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_linear_model_stays_near_chance(difficulty: float) -> None:
    images, labels = shapes.render(range(3000), seed=0, difficulty=difficulty)
    pixels = (images.reshape(3000, -1) / 255).astype(np.float32)
    # Far from converged, which helps it: more iterations only fit the training noise.
    model = LogisticRegression(max_iter=15)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(pixels[:2000], labels[:2000])
    assert model.score(pixels[2000:], labels[2000:]) < 0.2


def test_difficulty_adds_noise_and_removes_contrast() -> None:
    noise, contrast = [], []
    for difficulty in (0.0, 0.25, 0.5, 0.75, 1.0):
        images, _ = shapes.render(range(100), seed=0, difficulty=difficulty)
        # The median over pixels ignores the few that straddle an outline.
        steps = np.abs(np.diff(images.astype(np.float32), axis=2))
        noise.append(np.median(steps, axis=(1, 2, 3)).mean())
        # A high quantile looks at images whose shape, not their texture, sets the deviation.
        contrast.append(np.quantile(images.std((1, 2)), 0.9))
    assert np.all(np.diff(noise) > 0.5), noise
    assert np.all(np.diff(contrast) < -0.5), contrast


def test_difficulty_shrinks_the_shape() -> None:
    def mask(difficulty: float) -> np.ndarray:
        grid = (np.arange(32, dtype=np.float32) + 0.5) / 32
        # The same draws every time: only the difficulty may change the area. In a rendered image
        # it also changes noise and contrast, so that the shape's outline is lost.
        rng = np.random.default_rng(0)
        return shapes._shape_mask(shapes.SHAPES["disc"], rng, grid, difficulty)

    areas = [mask(difficulty).sum() for difficulty in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert np.all(np.diff(areas) < 0), areas


# NaN compares false with everything, so a careless check lets it through.
@pytest.mark.parametrize("difficulty", [-0.01, 1.01, float("nan")])
def test_bad_difficulty(difficulty: float) -> None:
    with pytest.raises(ValueError, match=r"^difficulty must be in \[0, 1\], got "):
        shapes.render(range(1), seed=0, difficulty=difficulty)


def test_bad_size() -> None:
    with pytest.raises(ValueError, match=r"^size must be at least 16, got 15$"):
        shapes.render(range(1), seed=0, size=15)


# A negative index has a valid label, so only the generator's key can refuse it.
@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_negative_seed_or_index(seed: int, index: int) -> None:
    with pytest.raises(ValueError, match="non-negative"):
        shapes.render([index], seed=seed)
