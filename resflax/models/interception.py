"""Interceptors of flax that are gone after their block, under `python -O` too."""

import contextlib
from collections.abc import Iterator

import flax.linen as nn


@contextlib.contextmanager
def intercepted(interceptor: nn.module.Interceptor) -> Iterator[None]:
    """`nn.intercept_methods`, which takes its interceptor away in an `assert`.

    `python -O` leaves that out, and every later call of a module would be intercepted.

    Args:
      interceptor: see `nn.intercept_methods`.
    """
    try:
        with nn.intercept_methods(interceptor):
            yield
    finally:
        if not __debug__:
            stack = getattr(nn.module, "_global_interceptor_stack", None)
            if stack is not None and next(iter(stack), None) is interceptor:
                stack.pop()
