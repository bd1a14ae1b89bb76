"""Tests of pooling: of the gradients by places against XLA's own, and of all by definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflax.ops import native
from resflax.ops.pool import max_pool

pytestmark = pytest.mark.devices(1, 8, long=8)

SETTINGS = [
    # window, stride, padding, height and width
    (2, 1, (0, 0), (5, 6)),
    (2, 2, (0, 0), (7, 6)),  # the last row is in no window
    (2, 2, (0, 1), (5, 7)),
    (2, 3, (0, 0), (8, 9)),  # pixels between the windows
    (2, 3, (1, 1), (7, 7)),
    (3, 1, (1, 1), (5, 4)),
    (3, 2, (1, 1), (7, 8)),
    (3, 2, (0, 1), (8, 5)),
    (3, 2, (0, 0), (8, 9)),
    (3, 3, (2, 0), (7, 7)),
    (5, 1, (2, 2), (5, 6)),
    (5, 2, (2, 2), (9, 8)),
    (5, 3, (1, 2), (9, 10)),
    (5, 3, (0, 0), (5, 6)),  # one window
]

# Lowerings beside XLA's own.
OTHERS = ["index", "native"] if native.available() else ["index"]


def _normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@functools.partial(jax.jit, static_argnames=("window", "stride", "padding", "value", "lowering"))
def _value_and_grad(x, *, window, stride, padding, value=-jnp.inf, lowering=None):
    y, pull = jax.vjp(lambda x: max_pool(x, window, stride, padding, value, lowering=lowering), x)
    return y, *pull(_normal(1, *y.shape, dtype=y.dtype))


def _each(x, window, stride, padding, value=-jnp.inf):
    """Value and gradient of XLA's own lowering, and those of the others."""
    settings = {"window": window, "stride": stride, "padding": padding, "value": value}
    names = OTHERS if x.dtype == jnp.float32 else ["index"]
    lax, *others = (_value_and_grad(x, lowering=name, **settings) for name in ("lax", *names))
    return lax, others


def _assert_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        a, e = (np.asarray(array, np.float32) for array in (a, e))
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-6 * np.nanmax(np.abs(e)))


@pytest.mark.first(3)
@pytest.mark.parametrize(("window", "stride", "padding", "size"), SETTINGS)
def test_the_lowerings_agree(window, stride, padding, size):
    x = _normal(0, 2, *size, 32)
    lax, others = _each(x, window, stride, padding)
    for other in others:
        _assert_close(other, lax)
    padded = np.pad(x, ((0, 0), padding, padding, (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (window, window), axis=(1, 2))
    np.testing.assert_array_equal(lax[0], windows[:, ::stride, ::stride].max((-1, -2)))


@pytest.mark.first(1)
@pytest.mark.parametrize(("window", "stride", "padding", "size"), SETTINGS[::3])
def test_they_agree_on_ties_and_signs(window, stride, padding, size):
    # Of three values, so that nearly every window has several maxima; below the padding's 0 too.
    x = jnp.asarray(np.random.default_rng(0).integers(-2, 1, (2, *size, 16)), jnp.float32)
    for value in (-jnp.inf, 0.0):
        lax, others = _each(x, window, stride, padding, value)
        for other in others:
            _assert_close(other, lax)


def test_the_first_of_equal_maxima_has_the_gradient():
    x = jnp.ones((1, 4, 4, 16))
    lax, others = _each(x, 2, 2, (0, 0))
    for y, grad in (lax, *others):
        expected = np.zeros((4, 4))
        expected[::2, ::2] = _normal(1, *y.shape)[0, :, :, 0]
        np.testing.assert_array_equal(grad[0, :, :, 0], expected)


def test_padding_of_zeros_takes_the_gradient_of_what_is_less():
    x = -1 - jnp.abs(_normal(0, 1, 6, 6, 16))
    lax, others = _each(x, 3, 2, (1, 1), 0.0)
    for y, grad in (lax, *others):
        inner = y[:, 1:, 1:]
        np.testing.assert_array_equal(y[:, 0], 0)
        np.testing.assert_array_equal(y[:, :, 0], 0)
        assert np.all(inner < 0)
        cotangent = _normal(1, *y.shape)[:, 1:, 1:]
        np.testing.assert_allclose(grad.sum(), cotangent.sum(), rtol=1e-5)


def test_bfloat16():
    x = _normal(0, 2, 9, 8, 5, dtype=jnp.bfloat16)
    # Windows that do not overlap: no sums, whose rounding would depend on their order.
    lax, (index,) = _each(x, 2, 2, (0, 0))
    _assert_close(index, lax)
    assert _each(x, 3, 2, (1, 1))[1][0][1].dtype == jnp.bfloat16


@pytest.mark.parametrize("place", [(0, 0), (2, 3), (6, 6)])
def test_what_is_not_a_number_stays_so(place):
    x = _normal(0, 1, 7, 7, 16).at[0, place[0], place[1], 0].set(jnp.nan)
    (lax, _), others = _each(x, 3, 2, (1, 1))
    for other, _ in others:
        np.testing.assert_array_equal(other, lax)
    assert np.isnan(lax[..., 0]).any()
    assert not np.isnan(lax[..., 1]).any()
    # The value alone, without a gradient.
    np.testing.assert_array_equal(max_pool(x, 3, 2, (1, 1), lowering="index"), lax)


@pytest.mark.first(1)
@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.vmap, lambda f: lambda x: jax.lax.map(f, x)])
def test_the_gradient_is_the_same_wherever_it_is_taken(wrap):
    x = _normal(0, 3, 2, 7, 6, 16)

    def grad(pool):
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(wrap(pool)(x)))))(x)

    def pool(x, lowering):
        y = max_pool(x.reshape(-1, 7, 6, 16), 3, 2, (1, 1), lowering=lowering)
        return y.reshape(*x.shape[:-3], *y.shape[1:])

    lax, *others = (grad(functools.partial(pool, lowering=name)) for name in ("lax", *OTHERS))
    for other in others:
        _assert_close([other], [lax])


def test_no_gradient_of_the_default_is_a_search():
    text = (
        jax.jit(jax.grad(lambda x: jnp.sum(max_pool(x, 3, 2, (1, 1)))))
        .lower(jnp.zeros((2, 8, 8, 4)))
        .as_text()
    )
    assert "select_and_scatter" not in text


@pytest.mark.parametrize(
    ("channels", "dtype", "window"), [(8, jnp.float32, 3), (16, jnp.bfloat16, 3), (16, float, 17)]
)
def test_what_the_kernels_do_not_know_is_refused(channels, dtype, window):
    with pytest.raises(ValueError, match="'native' is for float32, channels in sixteens"):
        max_pool(jnp.zeros((1, 20, 20, channels), dtype), window, 2, (0, 0), lowering="native")
