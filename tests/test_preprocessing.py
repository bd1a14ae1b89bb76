"""Images as a person has them, for a network that was trained on others."""

import re

import jax
import numpy as np
import pytest
from PIL import Image
from plain import config as plain_config

from resflax.data import augmentation, sources
from resflax.data.preprocessing import Preprocessing, PreprocessingError

RNG = np.random.default_rng(0)
GREY = Preprocessing((8, 8, 1), (0.4,), (0.2,), 8)
COLOUR = Preprocessing((8, 8, 3), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 10)


def noise(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("network", [GREY, COLOUR])
def test_batches_of_pixels_are_normalised_and_no_more(network):
    images = noise(5, *network.image_shape)
    expected = augmentation.normalizer(network.mean, network.std)(images)
    for given in (images, jax.numpy.asarray(images), images.astype(int), images.astype(np.float32)):
        np.testing.assert_array_equal(network(given), expected)
    for given in (list(images), tuple(images), images.tolist(), [images[0], *images[1:].tolist()]):
        np.testing.assert_array_equal(network(given), expected)
    np.testing.assert_array_equal(network(images[0]), expected[:1])
    assert network(images[:0]).shape == (0, *network.image_shape)
    # Compiled, a multiplication may take a division's place.
    np.testing.assert_allclose(jax.jit(network)(images), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def photos(tmp_path):
    """A data set of files: grey, of a palette, with transparency, and turned by Exif data."""
    turned = Image.Exif()
    turned[274] = 6
    for part in ("train", "val"):
        for name in "ab":
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            Image.fromarray(noise(30, 40, 3)).save(folder / "0.jpg", exif=turned)
            Image.fromarray(noise(20, 13, 4)).save(folder / "1.png")
            Image.fromarray(noise(12, 12)).save(folder / "2.png")
            Image.fromarray(noise(90, 50, 3)).convert("P").save(folder / "3.png")
    return tmp_path


def test_files_and_what_pillow_opened_are_what_an_evaluation_sees(photos):
    config = plain_config(**{"data.source": "folder", "data.eval_resize": 20})
    config.data.folder.path = str(photos)
    dataset = sources.load(config.data)
    described = dataset.description
    network = Preprocessing(described.image_shape, described.mean, described.std, 20)
    normalize = augmentation.normalizer(described.mean, described.std)
    files = [photos / "val" / name / file for name in "ab" for file in sorted_names(photos)]
    expected = np.asarray(normalize(dataset.test.images))
    np.testing.assert_array_equal(network(files), expected)
    np.testing.assert_array_equal(network(str(files[0])), expected[:1])
    opened = [Image.open(file) for file in files]
    np.testing.assert_array_equal(network(opened), expected)
    np.testing.assert_array_equal(network(opened[0]), expected[:1])
    # An array of another size; turned before it is resized, it may differ by a rounding.
    large = [np.asarray(Image.open(file)) for file in files if file.name == "0.jpg"]
    upright = np.stack([np.rot90(pixels, -1) for pixels in large])
    level = 1.01 / 255 / min(described.std)
    np.testing.assert_allclose(network(upright), expected[[0, 4]], atol=level)
    mixed = network([upright[0], files[4]])
    np.testing.assert_array_equal(mixed, [network(upright)[0], expected[4]])


def sorted_names(photos):
    return sorted(path.name for path in (photos / "val" / "a").iterdir())


def test_arrays_of_any_number_of_channels_are_resized():
    network = Preprocessing((8, 8, 5), (0.5,) * 5, (0.2,) * 5, 8)
    images = noise(2, 16, 20, 5)
    found = network(images)
    assert found.shape == (2, 8, 8, 5)
    one = Preprocessing((8, 8, 1), (0.5,), (0.2,), 8)
    np.testing.assert_array_equal(found[..., 3:4], one(images[..., 3:4]))
    with pytest.raises(PreprocessingError, match="cannot be made an image of 8 x 8 x 5"):
        network(Image.new("L", (8, 8)))
    with pytest.raises(PreprocessingError, match="cannot be made an image of 8 x 6 x 1"):
        Preprocessing((8, 6, 1), (0.5,), (0.2,), 8)(noise(2, 16, 20, 1))


@pytest.mark.parametrize(
    ("images", "right"),
    [
        (noise(2, 8, 8, 3) / 255, "float64 from 0 to 1; the network takes files"),
        (np.float32(noise(2, 8, 8, 3) / 255), "(of a scale of 0 to 1: (255 * image).round()"),
        (np.ones((2, 8, 8, 3), np.float32), "(of a scale of 0 to 1"),
        (noise(2, 8, 8, 3) + 0.5, "(image.round().astype('uint8'))"),
        (noise(2, 8, 8, 3) * np.uint16(257), "pixels are uint16 from 0 to"),
        (noise(2, 8, 8, 3).astype(int) - 128, "pixels are int64 from -1"),
        (np.full((2, 8, 8, 3), np.nan), "pixels are float64 from nan to nan"),
        (noise(2, 8, 8, 3) > 127, "pixels are bool"),
        (noise(2, 8, 8, 1), "[2, 8, 8, 1] has 1 channels, its last axis; the network takes"),
        (noise(2, 3, 8, 8), "arrays [N, 8, 8, 3] or of another size"),
        (noise(8, 8), "the images are [8, 8]"),
        (np.zeros((1, 0, 8, 3), np.uint8), "its shape is [1, 0, 8, 3]"),
        ([], "the list of images is empty"),
        ([noise(8, 8, 3), noise(2, 8, 8, 3)], "image 1: its shape is [2, 8, 8, 3]"),
        ([noise(8, 8, 3), noise(8, 8, 4)], "image 1: an array of shape [8, 8, 4] has 4 channels"),
        ([[[1, 2], [3]]], "image 0: it is no array"),
        (["/nowhere/cat.jpg"], "/nowhere/cat.jpg: it cannot be opened: No such file"),
        (__file__, "it is not an image (JPEG, PNG)"),
        (Image.new("F", (8, 8)), "its mode is F; convert it to L or RGB"),
        (None, "the images are NoneType"),
    ],
)
def test_other_images_are_refused_with_what_would_be_right(images, right):
    with pytest.raises(PreprocessingError, match=re.escape(right)):
        COLOUR(images)


def test_what_cannot_be_looked_at_under_jit_is_refused():
    with pytest.raises(PreprocessingError, match=r"traced images are float32 \[2, 8, 8, 3\]"):
        jax.jit(COLOUR)(np.ones((2, 8, 8, 3), np.float32))
    with pytest.raises(PreprocessingError, match=r"the images are \[8, 8, 3\]"):
        jax.jit(COLOUR)(noise(8, 8, 3))
