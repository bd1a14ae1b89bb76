"""Lowerings on a GPU against XLA's own, there: pytest -m gpu.

Of float32 in full precision; by default a GPU's matrix units round its operands.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflax.ops import conv, norm, pool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU"),
]

# Largest difference, as a share of the largest value.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2**-6}

# Size, input and output channels, kernel, stride, padding, groups, lowering.
CASES = [
    (28, 128, 128, 3, 1, 1, 32, "merged"),
    (29, 128, 256, 3, 2, 1, 32, "merged"),
    (224, 3, 64, 7, 2, 3, 1, "phases"),
    (75, 3, 32, 3, 2, 0, 1, "phases"),
    (64, 3, 96, 11, 4, 2, 1, "phases"),
    (14, 64, 256, 1, 1, 0, 1, "dot"),
]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def value_and_gradients(function, *operands):
    def both(*operands):
        y, pull = jax.vjp(function, *operands)
        return y, *pull(jax.random.normal(jax.random.key(9), y.shape, y.dtype))

    with jax.default_matmul_precision("highest"):
        return jax.jit(both)(*operands)


def assert_close(actual, expected, dtype):
    for a, e in zip(actual, expected, strict=True):
        a, e = (np.asarray(x.astype(jnp.float32)) for x in (a, e))
        assert np.abs(a - e).max() < TOLERANCE[dtype] * np.abs(e).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("size", "c_in", "c_out", "side", "stride", "padding", "groups", "lowering"), CASES
)
def test_convolutions(dtype, size, c_in, c_out, side, stride, padding, groups, lowering):
    x = normal(0, 8, size, size, c_in).astype(dtype)
    kernel = normal(1, side, side, c_in // groups, c_out) / side / (c_in / groups) ** 0.5
    settings = {"stride": stride, "padding": ((padding, padding),) * 2, "groups": groups}

    def results(lowering):
        return value_and_gradients(
            lambda x, k: conv.conv2d(x, k, lowering=lowering, **settings), x, kernel.astype(dtype)
        )

    expected = results("lax")
    assert_close(results(lowering), expected, dtype)
    assert_close(results(None), expected, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_max_pool(dtype):
    x = normal(2, 8, 57, 56, 64).astype(dtype)
    index, lax = (
        value_and_gradients(lambda x, w=w: pool.max_pool(x, 3, 2, (1, 1), lowering=w), x)
        for w in ("index", "lax")
    )
    assert_close(index, lax, dtype)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_a_norm_leaves(dtype, added):
    x, z = (normal(seed, 8, 57, 56, 64).astype(dtype) for seed in (2, 5))
    operands = x, normal(3, 1, 64), normal(4, 1, 64), *((z,) if added else ())

    def ours(x, scale, shift, residual=None):
        return norm.relu(norm.Affine(x, scale, shift, None, residual))

    def plain(x, scale, shift, residual=0.0):
        y = x.astype(jnp.float32) * scale[:, None, None] + shift[:, None, None]
        return jax.nn.relu(y + residual).astype(dtype)

    assert_close(value_and_gradients(ours, *operands), value_and_gradients(plain, *operands), dtype)
