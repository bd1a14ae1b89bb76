"""Names of jax and flax without a public counterpart; tests/test_compat.py holds each of them."""

from typing import Any

from flax.linen import module
from jax._src import distributed


def coordinator_address() -> str | None:
    """The HOST:PORT of process 0 that jax.distributed.initialize was given or detected."""
    return distributed.global_state.coordinator_address


def coordination_client() -> Any:
    """The client of the key-value store that the processes of jax.distributed share."""
    return distributed.global_state.client


def drop_interceptor(interceptor: Any) -> None:
    """Takes an interceptor away that nn.intercept_methods has left on top of flax's stack."""
    stack = module._global_interceptor_stack
    if next(iter(stack), None) is interceptor:
        stack.pop()
