"""Augmentation of single images, beside PIL's and the standard library's arithmetic."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resflax import config as config_lib
from resflax.data import augmentation, transforms
from resflax.data.transforms import AugmentationError

RESIZED_CROP = jax.jit(transforms.resized_crop)
EVERYTHING = {
    "crop_padding": 2,
    "flip": True,
    "resized_scale": (0.3, 1.0),
    "rand_augment_layers": 2,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "lighting": 0.1,
    "erasing": 0.5,
    "erasing_noise": 1.0,
    "cutout": 5,
}


def plain(images):
    return images.astype(jnp.float32)


def pictures(n, height=24, width=24, channels=3, seed=0):
    """Smooth noise: uint8 [n, height, width, channels]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 6, 6, channels)).astype(np.uint8)
    resized = [
        Image.fromarray(c.squeeze()).resize((width, height), Image.Resampling.BICUBIC)
        for c in coarse
    ]
    return np.stack([np.asarray(r) for r in resized]).reshape(n, height, width, channels)


def keys(n, seed=1):
    return jax.random.split(jax.random.key(seed), n)


def augmenter(normalize, **settings):
    settings = {**config_lib.base().augment, **settings}
    return augmentation.augmenter(normalize, augmentation.Augmentation(**settings))


def augmented(images, normalize=plain, seed=1, **settings):
    augment = jax.jit(augmenter(normalize, **settings))
    return np.asarray(augment(keys(len(images), seed), jnp.asarray(images)))


def luma(images):
    return (images @ np.array([0.2989, 0.587, 0.114]))[..., None]


def test_nothing_is_done_by_default():
    images = pictures(3)
    result = augmented(images)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, images)


@pytest.mark.long
def test_other_augmentation_does_not_change_what_crops_and_flips_draw():
    images = pictures(16, channels=1)

    @jax.jit
    @jax.vmap
    def draws(key):
        crop_key, flip_key = jax.random.split(key)
        return jax.random.randint(crop_key, (2,), 0, 5), jax.random.bernoulli(flip_key)

    expected = []
    for image, (y, x), flip in zip(images, *jax.device_get(draws(keys(16))), strict=True):
        crop = np.pad(image, ((2, 2), (2, 2), (0, 0)))[y : y + 24, x : x + 24]
        expected.append(crop[:, ::-1] if flip else crop)
    np.testing.assert_array_equal(augmented(images, crop_padding=2, flip=True), expected)
    settings = {"crop_padding": 2, "flip": True, "brightness": 0.5, "cutout": 4}
    for image, result in zip(expected, augmented(images // 2, **settings), strict=True):
        kept = result != 0
        assert kept.mean() > 0.6
        factors = result[kept] / (image[kept] // 2)
        np.testing.assert_allclose(factors, factors[0], rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_depends_on_its_own_key_alone(channels):
    images = jnp.asarray(pictures(6, channels=channels))
    settings = EVERYTHING if channels == 3 else {"rand_augment_layers": 2, "contrast": 0.4}
    normalize = augmentation.normalizer((0.5,) * channels, (0.25,) * channels)
    augment = jax.jit(augmenter(normalize, **settings))
    together = augment(keys(6), images)
    assert together.shape == images.shape
    assert together.dtype == jnp.float32
    assert np.isfinite(together).all()
    assert (np.abs(together - normalize(images)).max((1, 2, 3)) > 0.1).all()
    others = augment(
        keys(6, seed=2).at[1:3].set(keys(6)[1:3]), images[::-1].at[1:3].set(images[1:3])
    )
    np.testing.assert_array_equal(together[1:3], others[1:3])
    assert not np.allclose(together[0], augment(keys(6, seed=2), images)[0])


def test_jit_changes_nothing():
    images = pictures(4, channels=1)
    settings = {"contrast": 0.4}
    eager = augmenter(plain, **settings)(keys(4), jnp.asarray(images))
    np.testing.assert_allclose(eager, augmented(images, **settings), atol=1e-3)


@pytest.mark.parametrize("box", [(0, 0, 24, 30), (3, 5, 8, 20), (10, 0, 14, 6), (7, 9, 1, 1)])
def test_a_resized_crop_is_that_of_pil(box):
    (image,) = pictures(1, 24, 30)
    top, left, height, width = box
    expected = Image.fromarray(image).resize(
        (30, 24), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
    )
    result = RESIZED_CROP(jnp.asarray(image, jnp.float32), box)
    assert result.shape == image.shape
    np.testing.assert_allclose(result, np.asarray(expected), atol=1)


def boxes(n, height, width, scale, ratio=(3 / 4, 4 / 3)):
    """The boxes of resized crops, read off images whose values are their coordinates."""
    y, x = np.mgrid[:height, :width]
    image = jnp.asarray(np.stack([y, x], -1) * 1024, jnp.float32)
    crop = jax.jit(
        jax.vmap(lambda k: transforms.random_resized_crop(k, image, scale=scale, ratio=ratio))
    )
    # Half a box from the middle to each side: the two middle places of the result.
    result = np.asarray(crop(keys(n))) / 1024
    h, w = height // 2, width // 2
    heights = (result[:, h, w, 0] - result[:, h - 1, w, 0]) * height
    widths = (result[:, h, w, 1] - result[:, h, w - 1, 1]) * width
    middle_y = (result[:, h, w, 0] + result[:, h - 1, w, 0]) / 2 + 0.5
    middle_x = (result[:, h, w, 1] + result[:, h, w - 1, 1]) / 2 + 0.5
    return np.stack([middle_y - heights / 2, middle_x - widths / 2, heights, widths], -1)


@pytest.mark.long
def test_resized_crops_have_the_areas_and_ratios_asked_for():
    found = boxes(2000, 64, 64, (0.2, 0.6))
    whole = np.round(found)
    assert np.abs(found - whole).max() < 0.1
    top, left, height, width = whole.T
    assert (whole[:, :2] >= 0).all()
    assert (top + height <= 64).all()
    assert (left + width <= 64).all()
    area = height * width / 64**2
    assert area.min() > 0.19
    assert area.max() < 0.62
    assert abs(area.mean() - 0.4) < 0.01
    assert abs(area.std() - 0.4 / 12**0.5) < 0.01
    logs = np.log(width / height) / np.log(4 / 3)
    assert np.abs(logs).max() < 1.15
    assert abs(logs.mean()) < 0.05
    assert abs(logs.std() - 1 / 3**0.5) < 0.03
    # Places are uniform where the box fits.
    assert abs((top / np.maximum(64 - height, 1)).mean() - 0.5) < 0.03
    assert abs((left / np.maximum(64 - width, 1)).mean() - 0.5) < 0.03


@pytest.mark.long
def test_a_resized_crop_that_never_fits_is_the_largest_allowed_one_in_the_middle():
    found = boxes(20, 16, 64, (0.9, 1.0))
    np.testing.assert_allclose(found, np.tile([0, 21, 16, 21], (20, 1)), atol=0.1)
    assert (np.ptp(found, axis=0) < 0.1).all()


def test_adjusting_is_torchvisions_arithmetic():
    (image,) = pictures(1).astype(np.float64)
    for factor in (0.0, 0.6, 1.0, 1.7):

        def blended(other, factor=factor):
            return np.clip(factor * image + (1 - factor) * other, 0, 255)

        for adjust, expected in (
            (transforms.adjust_brightness, blended(0)),
            (transforms.adjust_contrast, blended(luma(image).mean())),
            (transforms.adjust_saturation, blended(luma(image))),
        ):
            result = jax.jit(adjust)(jnp.asarray(image, jnp.float32), factor)
            np.testing.assert_allclose(result, expected, atol=0.01)
    for turns in (-0.5, -0.1, 0.0, 0.25):
        hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in image.reshape(-1, 3) / 255]
        turned = [colorsys.hsv_to_rgb((h + turns) % 1, s, v) for h, s, v in hsv]
        result = jax.jit(transforms.adjust_hue)(jnp.asarray(image, jnp.float32), turns)
        np.testing.assert_allclose(result, np.reshape(turned, image.shape) * 255, atol=0.01)


@pytest.mark.long
def test_jitter_draws_factors_within_its_strength_of_one():
    image = np.full((1000, 2, 2, 1), 100, np.uint8)
    factors = augmented(image, brightness=0.4)[:, 0, 0, 0] / 100
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4
    assert abs(factors.mean() - 1) < 0.02
    assert (augmented(image, brightness=1.5) == 0).mean() < 0.02  # no factor is negative

    slopes = np.ptp(augmented(np.stack([image[:, 0] - 50, image[:, 0] + 50], 1), contrast=0.3))
    assert 100 * 1.28 < slopes <= 100 * 1.3 + 0.01

    red = np.tile(np.array([200, 100, 100], np.uint8), (500, 2, 2, 1))
    coloured = augmented(red, saturation=0.2)[:, 0, 0]
    spread = (coloured[:, 0] - coloured[:, 1]) / 100
    assert 0.8 <= spread.min() < 0.81
    assert 1.19 < spread.max() <= 1.2001
    hues = [colorsys.rgb_to_hsv(*p)[0] for p in augmented(red, hue=0.1)[:, 0, 0] / 255]
    turns = (np.array(hues) + 0.5) % 1 - 0.5
    assert -0.1001 <= turns.min() < -0.095
    assert 0.095 < turns.max() <= 0.1001


def test_jitter_comes_in_either_order():
    # An image that is brightened first is clipped elsewhere.
    (image,) = pictures(1)
    result = augmented(np.tile(image, (200, 1, 1, 1)), brightness=0.9, contrast=0.9)

    @jax.jit
    @jax.vmap
    def in_both_orders(key):
        _, bright_key, contrast_key, *_ = jax.random.split(jax.random.fold_in(key, 4), 5)
        b = jax.random.uniform(bright_key, minval=0.1, maxval=1.9)
        c = jax.random.uniform(contrast_key, minval=0.1, maxval=1.9)
        pixels = jnp.asarray(image, jnp.float32)
        first = transforms.adjust_contrast(transforms.adjust_brightness(pixels, b), c)
        return first, transforms.adjust_brightness(transforms.adjust_contrast(pixels, c), b)

    first, second = (np.abs(r - result).max((1, 2, 3)) < 0.01 for r in in_both_orders(keys(200)))
    assert (first | second).all()
    assert 60 < (first & ~second).sum() < 140
    assert 60 < (second & ~first).sum() < 140


def test_lighting_has_the_published_covariance():
    images = np.full((4000, 1, 1, 3), 100, np.uint8)
    shifts = (augmented(images, lighting=0.1)[:, 0, 0] - 100) / 255
    np.testing.assert_allclose(shifts.mean(0), 0, atol=2e-3)
    # Eigenvalues times normal numbers of standard deviation 0.1, along orthonormal axes; the first
    # of them is nearly grey, the second runs from red to blue.
    axes = np.array(
        [[-0.5675, -0.5808, -0.5836], [0.7192, -0.0045, -0.6948], [0.4009, -0.8140, 0.4203]]
    )
    along = shifts @ axes.T
    np.testing.assert_allclose(along.std(0), [0.02175, 0.00188, 0.00045], rtol=0.05)
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-3)


def erased_boxes(images, result):
    """(top, left, height, width) of what changed, or None; asserts that it is a whole box."""
    found = []
    for image, erased in zip(images, result, strict=True):
        changed = (image != erased).any(-1)
        if not changed.any():
            found.append(None)
            continue
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        found.append((rows[0], columns[0], len(rows), len(columns)))
        assert rows[-1] - rows[0] + 1 == len(rows)
        assert columns[-1] - columns[0] + 1 == len(columns)
    return found


@pytest.mark.long
def test_erasing_has_the_rate_the_areas_and_the_ratios_asked_for():
    images = np.full((2000, 40, 32, 1), 9, np.uint8)
    result = augmented(images, erasing=0.3, erasing_area=(0.1, 0.2), erasing_ratio=0.5)
    assert set(np.unique(result)) == {0, 9}
    found = erased_boxes(images, result)
    drawn = np.array([box for box in found if box])
    assert abs(len(drawn) / 2000 - 0.3) < 0.04
    top, left, height, width = drawn.T
    area = height * width / (40 * 32)
    assert area.min() > 0.085
    assert area.max() < 0.225
    assert abs(area.mean() - 0.15) < 0.01
    ratio = height / width
    assert 0.44 < ratio.min() < 0.6
    assert 1.8 < ratio.max() < 2.25
    assert abs(ratio.mean() - 1.25) < 0.06
    assert abs((top / (40 - height)).mean() - 0.5) < 0.05
    assert abs((left / (32 - width)).mean() - 0.5) < 0.05


def test_erasing_fills_with_noise_of_its_own():
    images = np.full((200, 32, 32, 1), 9, np.uint8)
    result = augmented(images, erasing=1.0, erasing_noise=1.0)
    assert None not in erased_boxes(images, result)
    noise = result[result != 9]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert len(np.unique(noise)) > 0.99 * len(noise)


def test_erasing_fills_with_a_value():
    images = np.full((20, 32, 32, 1), 9, np.uint8)
    result = augmented(images, erasing=1.0, erasing_value=0.5)
    assert set(np.unique(result)) == {0.5, 9.0}


@pytest.mark.long
def test_what_cannot_be_erased_whole_is_left():
    images = np.full((50, 8, 8, 1), 9, np.uint8)
    settings = {"erasing_area": (1.0, 1.0), "erasing_ratio": 1.0}
    np.testing.assert_array_equal(augmented(images, erasing=1.0, **settings), images)


@pytest.mark.parametrize("side", [4, 5])
def test_cutout_is_a_square_that_is_centred_anywhere(side):
    images = np.full((1000, 16, 12, 1), 9, np.uint8)
    result = augmented(images, cutout=side)
    assert set(np.unique(result)) == {0, 9}
    found = np.array(erased_boxes(images, result))
    top, left, height, width = found.T
    inside = (top > 0) & (top + height < 16) & (left > 0) & (left + width < 12)
    assert (found[inside, 2:] == side).all()
    assert (found[:, 2:] <= side).all()
    assert found[:, 2:].min() == (side + 1) // 2
    # Every pixel is a centre equally often.
    assert abs(inside.mean() - (16 - side - 1) * (12 - side - 1) / (16 * 12)) < 0.05
    corner = (result[:, 0, 0, 0] == 0).mean()
    assert abs(corner - (side // 2 + 1) ** 2 / (16 * 12)) < 0.03


def test_zeros_are_those_of_the_normalised_image():
    images = pictures(8)
    normalize = augmentation.normalizer((0.5,) * 3, (0.25,) * 3)
    result = augmented(images, normalize, cutout=6)
    expected = np.asarray(normalize(images))
    same = result == expected
    assert (result[~same] == 0).all()
    assert (~same).any((1, 2, 3)).all()


def test_ten_crops_are_the_corners_the_middle_and_their_mirror_images():
    y, x = np.mgrid[:8, :10]
    images = np.stack([10 * y + x, 1000 + 10 * y + x])[..., None].astype(np.float32)
    crops = np.asarray(transforms.ten_crop(jnp.asarray(images), 4))
    assert crops.shape == (10, 2, 4, 4, 1)
    for crop, (top, left) in zip(crops, [(0, 0), (0, 6), (4, 0), (4, 6), (2, 3)], strict=False):
        np.testing.assert_array_equal(crop, images[:, top : top + 4, left : left + 4])
    np.testing.assert_array_equal(crops[5:], crops[:5, :, :, ::-1])
    np.testing.assert_array_equal(transforms.center_crop(jnp.asarray(images), 4), crops[4])


@pytest.mark.parametrize("size", [0, 9])
@pytest.mark.parametrize("crop", [transforms.ten_crop, transforms.center_crop])
def test_crops_are_not_larger_than_the_images(crop, size):
    with pytest.raises(
        AugmentationError, match=f"crop of {size} pixels .* 8x10 must be from 1 to 8"
    ):
        crop(jnp.zeros((2, 8, 10, 1)), size)


@pytest.mark.parametrize(
    ("settings", "right"),
    [
        ({"crop_padding": -1}, "augment.crop_padding -1 must be at least 0"),
        ({"brightness": float("nan")}, "augment.brightness nan must be at least 0"),
        ({"hue": 0.6}, "augment.hue 0.6 must be from 0 to 0.5"),
        ({"erasing": 1.5}, "augment.erasing 1.5 must be from 0 to 1"),
        ({"erasing_ratio": 0.0}, "augment.erasing_ratio 0.0 must be"),
        ({"erasing_noise": -1.0}, "augment.erasing_noise -1.0 must be"),
        ({"erasing_area": (0.4, 0.2)}, r"augment.erasing_area \(0.4, 0.2\) must be two positive"),
        ({"resized_scale": (0.1,)}, r"augment.resized_scale \(0.1,\) must be two positive"),
        ({"resized_scale": (0.1, 1.1)}, "the least and the most, at most 1"),
        (
            {"resized_scale": (0.1, 1.0), "resized_ratio": (0, 1)},
            r"augment.resized_ratio \(0, 1\) must be two positive",
        ),
        ({"rand_augment_magnitude": 11}, "augment.rand_augment_magnitude 11 must be from 0 to 10"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, right):
    with pytest.raises(AugmentationError, match=right):
        augmenter(plain, **settings)


@pytest.mark.parametrize("name", ["saturation", "hue", "lighting"])
def test_grey_images_have_no_colour_to_change(name):
    with pytest.raises(AugmentationError, match=rf"augment.{name} 0.1: for images of 3 channels"):
        augmented(pictures(2, channels=1), **{name: 0.1})


@pytest.mark.parametrize("settings", [{"contrast": 0.1}, {"rand_augment_layers": 1}])
def test_luma_is_of_one_channel_or_three(settings):
    with pytest.raises(AugmentationError, match="1 or 3 channels, and these have 2"):
        augmented(np.zeros((2, 8, 8, 2), np.uint8), **settings)


def test_pixels_are_normalised_where_types_must_be_told():
    images = np.full((1, 2, 2, 3), 51, np.uint8)
    with jax.numpy_dtype_promotion("strict"):
        normalized = augmentation.normalizer((0.1,) * 3, (0.5,) * 3)(images)
    np.testing.assert_allclose(normalized, 0.2, rtol=1e-6)
