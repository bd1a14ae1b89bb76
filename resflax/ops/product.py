"""Products with matrices, of which 1x1 convolutions are made, on a CPU: see kernels/product.cc."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from resflax.ops import native


def supports(kernel_shape: Sequence[int]) -> bool:
    """Whether there is a kernel for a product with such a float32 matrix: of whole vectors."""
    return all(n % 16 == 0 for n in kernel_shape)


@jax.custom_vjp
def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies each vector of the last axis with a matrix.

    Args:
      x: [..., C_in], float32, not empty.
      kernel: [C_in, C_out], float32, that `supports` is true of.

    Returns:
      [..., C_out].
    """
    return _product(x, kernel, transposed=False)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return multiply(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    return _product(dy, kernel, transposed=True), native.call("ProductGradient", kernel, x, dy)


multiply.defvjp(_forward, _backward)


def _product(x: jax.Array, kernel: jax.Array, *, transposed: bool) -> jax.Array:
    columns = kernel.shape[0 if transposed else 1]
    result = jax.ShapeDtypeStruct((*x.shape[:-1], columns), jnp.float32)
    return native.call("Product", result, x, kernel, transposed=np.bool_(transposed))
