"""Interceptors of flax that are gone after their block, under `python -O` too."""

import contextlib
from collections.abc import Iterator

import flax.linen as nn

from resflax import compat


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
            compat.drop_interceptor(interceptor)
