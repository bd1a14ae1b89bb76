"""RandAugment's operations beside those of PIL."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from resflax.data import rand_augment

# Of PIL: the magnitude m and the sign s to a function of images.
BILINEAR = Image.Resampling.BILINEAR


def affine(image, matrix):
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, BILINEAR, fillcolor=grey_of(image)
    )


def grey_of(image):
    return 128 if image.mode == "L" else (128, 128, 128)


def enhanced(enhancer):
    return lambda image, m, s: enhancer(image).enhance(m / 10 * 1.8 + 0.1)


PIL_OPERATIONS = {
    "identity": lambda image, m, s: image,
    "auto_contrast": lambda image, m, s: ImageOps.autocontrast(image),
    "equalize": lambda image, m, s: ImageOps.equalize(image),
    "solarize": lambda image, m, s: ImageOps.solarize(image, int(m / 10 * 256)),
    "posterize": lambda image, m, s: ImageOps.posterize(image, max(1, int(m / 10 * 4))),
    "colour": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "brightness": enhanced(ImageEnhance.Brightness),
    "sharpness": enhanced(ImageEnhance.Sharpness),
    "rotate": lambda image, m, s: image.rotate(s * m / 10 * 30, BILINEAR, fillcolor=grey_of(image)),
    "shear_x": lambda image, m, s: affine(image, (1, s * m / 10 * 0.3, 0, 0, 1, 0)),
    "shear_y": lambda image, m, s: affine(image, (1, 0, 0, s * m / 10 * 0.3, 1, 0)),
    "translate_x": lambda image, m, s: affine(
        image, (1, 0, s * m / 10 * image.width * 100 / 224, 0, 1, 0)
    ),
    "translate_y": lambda image, m, s: affine(
        image, (1, 0, 0, 0, 1, s * m / 10 * image.height * 100 / 224)
    ),
}
EXACT = ("identity", "equalize", "solarize", "posterize")
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def picture(channels, height=40, width=48):
    """Smooth, of few extremes, and not symmetric in anything."""
    y, x = np.mgrid[:height, :width]
    waves = [
        120 + 60 * np.sin(x / 5 + c) + 50 * np.cos(y / (3 + c)) + x - y / 2 for c in range(channels)
    ]
    return np.clip(np.stack(waves, -1), 20, 240).astype(np.uint8)


@functools.cache
def distortion(magnitude):
    return jax.jit(functools.partial(rand_augment.distort, magnitude=magnitude))


def test_the_operations_are_the_papers():
    assert len(rand_augment.OPERATIONS) == 14
    assert set(rand_augment.OPERATIONS) == set(PIL_OPERATIONS)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [2, 9])
@pytest.mark.parametrize("name", PIL_OPERATIONS)
def test_an_operation_is_that_of_pil(name, magnitude, channels):
    pixels = picture(channels)
    image = Image.fromarray(pixels.squeeze())
    for sign in (1, -1) if name in GEOMETRIC else (1,):
        expected = np.asarray(PIL_OPERATIONS[name](image, magnitude, sign), np.float32)
        result = distortion(magnitude)(
            jnp.asarray(pixels, jnp.float32), rand_augment.OPERATIONS.index(name), float(sign)
        )
        assert result.shape == pixels.shape
        assert result.dtype == jnp.float32
        np.testing.assert_array_equal(result, np.round(result))
        difference = np.abs(np.asarray(result) - expected.reshape(pixels.shape))
        # PIL truncates where this rounds; and a place at the very edge may fall to either side.
        assert np.mean(difference <= 1) > 0.99
        assert difference.max() <= 2 or name in GEOMETRIC
        if name in EXACT or (name == "colour" and channels == 1):
            assert not difference.any()
        if name != "identity" and (name != "colour" or channels == 3):
            assert np.mean(expected.reshape(pixels.shape) != pixels) > 0.01


@pytest.mark.parametrize("name", ["colour", "contrast", "brightness", "sharpness"])
def test_the_middle_magnitude_enhances_nothing(name):
    pixels = jnp.asarray(picture(3), jnp.float32)
    index = rand_augment.OPERATIONS.index(name)
    np.testing.assert_array_equal(distortion(5)(pixels, index, 1.0), pixels)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_the_least_magnitude_moves_nothing(name):
    pixels = jnp.asarray(picture(3), jnp.float32)
    index = rand_augment.OPERATIONS.index(name)
    np.testing.assert_array_equal(distortion(0)(pixels, index, -1.0), pixels)


@pytest.mark.parametrize("name", rand_augment.OPERATIONS)
@pytest.mark.parametrize("value", [0, 77, 255])
def test_an_even_image_stays_even(name, value):
    image = Image.new("RGB", (8, 8), (value,) * 3)
    expected = np.asarray(PIL_OPERATIONS[name](image, 2, 1), np.float32)
    index = rand_augment.OPERATIONS.index(name)
    result = distortion(2)(jnp.full((8, 8, 3), value, jnp.float32), index, 1.0)
    assert np.isfinite(result).all()
    assert np.abs(result - expected).max() <= 1


def layered(pixels, n=400, layers=1):
    augment = functools.partial(rand_augment.rand_augment, layers=layers, magnitude=9)
    keys = jax.random.split(jax.random.key(0), n)
    images = jnp.asarray(pixels, jnp.float32)
    return np.asarray(jax.jit(jax.vmap(augment, (0, None)))(keys, images))


@pytest.mark.long
def test_every_operation_is_drawn_equally_often_with_both_signs():
    pixels = picture(3, 18, 20)  # with fewer than 255, equalising would do nothing
    signs = {name: (1.0, -1.0) if name in GEOMETRIC else (1.0,) for name in PIL_OPERATIONS}
    results = layered(pixels, n=1400)
    counts = {}
    for name in rand_augment.OPERATIONS:
        index = rand_augment.OPERATIONS.index(name)
        for sign in signs[name]:
            expected = distortion(9)(jnp.asarray(pixels, jnp.float32), index, sign)
            counts[name, sign] = int((results == np.asarray(expected)).all((1, 2, 3)).sum())
    assert sum(counts.values()) == 1400
    for (name, _), count in counts.items():
        expected = 1400 / 14 / len(signs[name])
        assert abs(count - expected) < 5 * expected**0.5, counts


@pytest.mark.long
def test_layers_follow_one_another():
    pixels = jnp.asarray(picture(1, 10, 10), jnp.float32)
    operations = jnp.repeat(jnp.arange(14), 2)
    signs = jnp.tile(jnp.asarray([1.0, -1.0]), 14)
    every = jax.jit(jax.vmap(distortion(9), (None, 0, 0)))
    once = every(pixels, operations, signs)
    twice = jax.jit(jax.vmap(every, (0, None, None)))(once, operations, signs)
    possible = {image.tobytes() for image in np.asarray(twice).reshape(-1, 10, 10, 1)}
    results = {image.tobytes() for image in layered(pixels, layers=2)}
    assert results <= possible
    assert len(results) > 60
