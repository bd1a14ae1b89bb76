"""Tests that an interceptor ends with its block, also where `python -O` leaves asserts out."""

import subprocess
import sys

import flax.linen as nn
import jax.numpy as jnp
import pytest

from resflax.models.interception import intercepted


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        return 2 * x


def outcome():
    return Twice().apply({}, jnp.ones(())).item()


def test_it_ends_with_its_block_and_those_around_it_stay():
    def thrice(call, args, kwargs, context):
        return 3 * call(*args, **kwargs)

    with intercepted(thrice):
        with intercepted(thrice):
            assert outcome() == 18
        assert outcome() == 6
        with pytest.raises(KeyError), intercepted(thrice):
            raise KeyError
        assert outcome() == 6
    assert outcome() == 2


OPTIMISED = """
import jax, jax.numpy as jnp, resflax
model = resflax.create_model("cifar_resnet20", depth=8)
for _ in range(2):
    print(resflax.count(model, (8, 8, 3)).params)
images = jnp.ones((1, 8, 8, 3))
variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
print(sum(x.size for x in jax.tree.leaves(variables["params"])))
"""


@pytest.mark.long
def test_it_ends_under_python_o():
    command = [sys.executable, "-O", "-c", OPTIMISED]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(set(result.stdout.split())) == 1
