"""Activations of arrays whose results XLA would change."""

import jax
import jax.numpy as jnp


@jax.custom_jvp
@jax.jit
def relu(x: jax.Array) -> jax.Array:
    """The rectified linear unit, max(x, 0), with gradient 0 at 0; NaN stays NaN.

    jax.nn.relu is a maximum, and on a CPU XLA (jaxlib 0.10.2) turns the NaN of a maximum into the
    other operand where it fuses it with a sum or a mean: docs/nan.md has a reproduction. A
    comparison and a selection keep it.

    Args:
      x: float, of any shape.

    Returns:
      The shape and dtype of `x`.
    """
    return jnp.where(x < 0, jnp.zeros_like(x), x)


@relu.defjvp
def _relu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return relu(x), jnp.where(x > 0, dx, jnp.zeros_like(dx))
