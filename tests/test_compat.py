"""The private names of jax and flax that the package uses."""

import inspect

import flax.linen as nn
from jax._src import distributed
from jax._src.lib import _jax

from resflax import compat


def test_a_process_alone_has_no_coordinator():
    assert compat.coordinator_address() is None
    assert compat.coordination_client() is None


def test_the_state_and_the_client_have_the_names_that_are_used():
    assert {"coordinator_address", "client"} <= vars(distributed.State).keys()
    assert inspect.isroutine(_jax.DistributedRuntimeClient.key_value_set)
    assert inspect.isroutine(_jax.DistributedRuntimeClient.key_value_try_get)


def test_an_interceptor_that_was_left_is_dropped_and_no_other_one():
    stack = nn.module._global_interceptor_stack
    with nn.intercept_methods(print):
        assert list(stack) == [print]
    stack.push(print)
    compat.drop_interceptor(len)
    assert list(stack) == [print]
    compat.drop_interceptor(print)
    assert list(stack) == []
