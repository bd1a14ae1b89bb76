"""Tests of the taps themselves, on a network whose every number can be followed by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflax import create_model
from resflax.analysis import taps
from resflax.ops.norm import Affine


class Times(nn.Module):
    """A part that multiplies, and adds what it is told to."""

    factor: float

    def __call__(self, x, plus=0.0):
        return self.factor * x + plus

    def twice(self, x):
        return self(self(x))


class Network(nn.Module):
    """(x * 3 + 1) * 2 * 2: the names of its parts are not in the order of their use."""

    def setup(self):
        self.second = Times(3.0)
        self.first = Times(2.0)

    def __call__(self, x):
        return self.first.twice(self.second(x, plus=1.0))


X = jnp.asarray([1.0, -2.0])
RESULT = (X * 3 + 1) * 4


def apply(*arguments):
    return Network().apply({}, *arguments)


def calls(module, method):
    """Selects the call of every part."""
    return "/".join(module.path) if module.path and method == "__call__" else None


def test_the_result_stays_and_what_passed_stands_in_order_of_use():
    result, found = taps.recorded(apply, calls)(X)
    np.testing.assert_array_equal(result, RESULT)
    assert list(found) == ["second", "first"]
    np.testing.assert_array_equal(found["second"].input, X)
    np.testing.assert_array_equal(found["second"].output, X * 3 + 1)


def test_of_a_method_that_is_called_twice_the_last_call_counts():
    _, found = taps.recorded(apply, calls)(X)
    np.testing.assert_array_equal(found["first"].input, (X * 3 + 1) * 2)
    np.testing.assert_array_equal(found["first"].output, RESULT)


def test_a_method_is_picked_by_its_name():
    def twice(module, method):
        return "both" if method == "twice" else None

    _, found = taps.recorded(apply, twice)(X)
    assert list(found) == ["both"]
    np.testing.assert_array_equal(found["both"].input, X * 3 + 1)
    np.testing.assert_array_equal(found["both"].output, RESULT)


def test_every_call_has_a_record_of_its_own():
    record = taps.recorded(apply, calls)
    (_, one), (_, other) = record(X), record(X + 1)
    np.testing.assert_array_equal(one["second"].input, X)
    np.testing.assert_array_equal(other["second"].input, X + 1)


def test_what_a_norm_left_to_be_computed_is_given_computed():
    class Norm(nn.Module):
        def __call__(self, x):
            return Affine(x, jnp.full((1, 2), 3.0), jnp.full((1, 2), -1.0))

    class After(nn.Module):
        def __call__(self, y):
            return y.pooled()

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return After(name="after")(Norm(name="norm")(x))

    x = jnp.arange(8.0).reshape(1, 2, 2, 2)
    _, found = taps.recorded(lambda x: Normed().apply({}, x), calls)(x)
    np.testing.assert_array_equal(found["norm"].output, 3 * x - 1)
    np.testing.assert_array_equal(found["after"].input, 3 * x - 1)


def test_an_edit_gets_the_method_with_its_arguments_and_gives_the_result():
    seen = []

    def edit(name, method, x, **settings):
        seen.append((name, sorted(settings)))
        return method(-x, **settings) if name == "second" else x

    def select(module, method):
        return None if module.name == "first" and method == "__call__" else calls(module, method)

    result = taps.edited(apply, select, edit)(X)
    np.testing.assert_array_equal(result, (-X * 3 + 1) * 4)
    assert seen == [("second", ["plus"])]


def test_an_edit_that_leaves_the_method_out_skips_it():
    class Broken(nn.Module):
        def __call__(self, x):
            raise KeyError("called")

    def always(module, method):
        return method

    skipped = taps.edited(lambda x: Broken().apply({}, x), always, lambda name, method, x: x + 1)
    np.testing.assert_array_equal(skipped(X), X + 1)


def test_outside_the_call_nothing_is_tapped():
    def fail(name, method, x, **_):
        raise KeyError(name)

    tapped = taps.edited(apply, calls, fail)
    with pytest.raises(KeyError, match="second"):
        tapped(X)
    np.testing.assert_array_equal(apply(X), RESULT)


def test_shapes_are_found_once_for_images_of_one_shape_and_type_without_computing():
    traces = []

    def counted(variables, images):
        assert isinstance(images, jax.core.Tracer)
        traces.append((images.shape, str(images.dtype)))
        return apply(images)

    shapes = taps.shapes(counted, calls)
    images = np.zeros((4, 2), np.float32)
    found = shapes({}, images)
    assert list(found) == ["second", "first"]
    assert (found["first"].output.shape, found["first"].output.dtype) == ((4, 2), jnp.float32)
    assert shapes({}, images + 1) is found
    assert shapes({}, images[:3])["first"].input.shape == (3, 2)
    shapes({}, images.astype(np.int32))
    assert traces == [((4, 2), "float32"), ((3, 2), "float32"), ((4, 2), "int32")]


def variables_of(model, size=8):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    init = functools.partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), images), images


def test_loops_are_written_out_and_the_variables_stay():
    model = create_model("cifar_resnet20", num_filters=4, scan=2, remat=True)
    plain = taps.written_out(model)
    assert (plain.scan, plain.remat) == (0, False)
    assert plain == create_model("cifar_resnet20", num_filters=4, scan=0)
    assert variables_of(model)[0] == variables_of(plain)[0]


def test_a_network_without_loops_stays_as_it_is():
    model = create_model("vgg11", num_classes=10)
    assert taps.written_out(model) == model


def test_the_parts_are_the_blocks_without_the_last_norm_the_dropout_and_the_classifier():
    model = create_model(
        "cifar_resnet20", depth=8, num_filters=4, unit="full_preact", dropout=0.5, se_reduction=2
    )
    variables, images = variables_of(model)
    assert {"norm", "head"} < variables["params"].keys()
    found = taps.shapes(functools.partial(model.apply, train=False), taps.parts)(variables, images)
    assert list(found) == ["stem", "stage2_block1", "stage3_block1", "stage4_block1"]
    assert found["stage4_block1"].input.shape == (1, 4, 4, 8)
    assert found["stage4_block1"].output.shape == (1, 2, 2, 16)
