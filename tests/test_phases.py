"""Tests of putting an image together from its phases."""

import jax.numpy as jnp
import numpy as np
import pytest

from resflax.ops.phases import interleave


def _image(height, width):
    return np.arange(1, 2 * height * width * 3 + 1, dtype=np.float32).reshape(2, height, width, 3)


@pytest.mark.first(4)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (6, 6), (7, 3)])
def test_interleaving_is_the_inverse_of_taking_phases(height, width, stride):
    image = _image(height, width)
    phases = [[image[:, p::stride, q::stride] for q in range(stride)] for p in range(stride)]
    np.testing.assert_array_equal(interleave(phases, height, width), image)


def test_what_is_lacking_is_zero_and_what_is_beyond_is_left_out():
    image = _image(8, 9)
    phases = [[image[:, p::2, q::2] for q in range(2)] for p in range(2)]
    phases[1][0] = phases[1][0][:, :2, :3]  # to row 3 and column 4
    expected = image[:, :7, :7].copy()
    expected[:, 5::2, ::2] = expected[:, 1::2, 6::2] = 0
    np.testing.assert_array_equal(interleave(phases, 7, 7), expected)


def test_phases_may_differ_in_number_by_direction():
    image = _image(4, 7)
    np.testing.assert_array_equal(
        interleave(
            [[image[:, ::2, q::3] for q in range(3)], [image[:, 1::2, q::3] for q in range(3)]],
            4,
            7,
        ),
        image,
    )


def test_one_phase_is_the_image_itself():
    image = jnp.asarray(_image(3, 4))
    assert interleave([[image]], 3, 4) is image
    padded = interleave([[image]], 4, 3)
    np.testing.assert_array_equal(padded, np.pad(image, ((0, 0), (0, 1), (0, 0), (0, 0)))[:, :, :3])
