"""The identity path, stochastic depth, the forms of a ResNeXt block, and what stands between."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resflax
from resflax.models import layers, residual, skips

pytestmark = pytest.mark.devices(1, 8, long=8)

TINY = {"num_filters": 4, "num_classes": 3}
IMAGES = jax.random.normal(jax.random.key(1), (6, 8, 8, 3))


@functools.cache
def network(name="cifar_resnet20", **overrides):
    model = resflax.create_model(name, **{"depth": 8, **TINY, **overrides})
    init = jax.jit(functools.partial(model.init, train=False))
    return model, init(jax.random.key(0, impl="rbg"), IMAGES)


@functools.partial(jax.jit, static_argnums=0)
def train(model, variables, seed=0):
    rngs = {"dropout": jax.random.key(seed)}
    return model.apply(variables, IMAGES, train=True, mutable=["batch_stats"], rngs=rngs)


@pytest.mark.first(1)
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("form", ["a", "b"])
def test_the_forms_of_resnext_agree_in_value_and_gradient(form, is_training):
    settings = {"depth": 11, "block": "bottleneck", "cardinality": 4, "base_width": 32}
    reference, variables = network(**settings)
    model, of_form = network(**settings, form=form)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, of_form)

    @functools.partial(jax.jit, static_argnums=1)
    def results(params, model):
        def loss(params):
            out, mutated = model.apply(
                variables | {"params": params}, IMAGES, train=is_training, mutable=["batch_stats"]
            )
            return jnp.sum(out**2), (out, mutated)

        return jax.grad(loss, has_aux=True)(params)

    grads, values = results(variables["params"], reference)
    grads_of_form, values_of_form = results(variables["params"], model)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_of_form), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(a).max())))
    for a, b in zip(jax.tree.leaves(values), jax.tree.leaves(values_of_form), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_the_forms_compute_different_convolutions():
    def convolutions(form):
        model, variables = network(
            depth=11, block="bottleneck", cardinality=4, base_width=32, form=form
        )
        forward = functools.partial(model.apply, train=False)
        text = jax.jit(forward).lower(variables, IMAGES).as_text()
        return text.count("stablehlo.convolution") + text.count("stablehlo.dot_general")

    # Each of three blocks has a projection and, in form c, a 3x3 in blocks between two 1x1.
    assert convolutions("a") > convolutions("b") > convolutions("c")


def terms(skip):
    """The two terms of the sum for x = 2, a shortcut of 3 and a residual of 5."""
    x, shortcut, branch = (jnp.full((1, 4, 4, 2), value) for value in (2.0, 3.0, 5.0))
    variables = skip.init({"params": jax.random.key(0)}, x, shortcut, branch)
    return variables, skip.apply(variables, x, shortcut, branch)


def test_constant_scaling_scales_both_terms():
    _, (shortcut, branch) = terms(skips.Scaling(0.5, 0.25))
    assert float(shortcut[0, 0, 0, 0]) == 1.5
    assert float(branch[0, 0, 0, 0]) == 1.25


@pytest.mark.long
@pytest.mark.parametrize("exclusive", [False, True])
def test_gates_divide_the_sum(exclusive):
    variables, (shortcut, branch) = terms(skips.Gating(-6.0, exclusive, layers.Conv))
    conv = variables["params"]["conv"]
    np.testing.assert_array_equal(conv["bias"], -6.0)
    gate = jax.nn.sigmoid(2.0 * conv["kernel"][0, 0].sum(0) - 6.0)
    np.testing.assert_allclose(shortcut[0, 0, 0], 3.0 * (1 - gate), rtol=1e-5)
    np.testing.assert_allclose(branch[0, 0, 0], 5.0 * gate if exclusive else 5.0, rtol=1e-5)


def test_dropout_on_the_shortcut_is_off_in_evaluation():
    x = jnp.ones((1, 8, 8, 4))
    skip = skips.ShortcutDropout(train=True)
    shortcut, branch = skip.apply({}, x, x, x, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(shortcut)) == {0.0, 2.0}
    np.testing.assert_array_equal(branch, x)
    np.testing.assert_array_equal(skips.ShortcutDropout(train=False).apply({}, x, x, x)[0], x)


@pytest.mark.long
@pytest.mark.parametrize("skip", skips.SKIPS)
def test_every_skip_trains(skip):
    model, variables = network(skip=skip, skip_scale=0.5)
    logits, mutated = train(model, variables)
    assert np.isfinite(logits).all()
    plain, _ = train(*network())
    assert (skip == "identity") == bool(np.allclose(logits, plain))
    assert mutated["batch_stats"].keys() == variables["batch_stats"].keys()


@pytest.mark.long
def test_conv1x1_is_option_c():
    _, a = network(skip="conv1x1", shortcut="A")
    _, b = network(shortcut="C")
    assert jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)


def dropped(mode, train, n=2000):
    module, rngs = residual.DropPath(mode, train), {"dropout": jax.random.key(0)}
    return np.asarray(module.apply({}, jnp.ones((n, 1, 1, 1)), 0.25, rngs=rngs))


def test_stochastic_depth_per_sample_keeps_the_expectation():
    out = dropped("sample", train=True)
    np.testing.assert_allclose(np.unique(out), [0.0, 1 / 0.75], rtol=1e-6)
    np.testing.assert_allclose(out.mean(), 1.0, atol=0.05)
    np.testing.assert_array_equal(dropped("sample", train=False), 1.0)


def test_stochastic_depth_per_batch_draws_once_and_scales_in_evaluation():
    assert len(np.unique(dropped("batch", train=True))) == 1
    np.testing.assert_array_equal(dropped("batch", train=False), 0.75)


@pytest.mark.parametrize(
    ("mode", "rates"), [("batch", [1 / 6, 2 / 6, 0.5]), ("sample", [0.0, 0.25, 0.5])]
)
def test_stochastic_depth_grows_linearly(mode, rates):
    model = resflax.create_model("cifar_resnet20", depth=8, drop_path=0.5, drop_path_mode=mode)
    np.testing.assert_allclose([model.drop_rate(stage, 1) for stage in (2, 3, 4)], rates)


@pytest.mark.long
def test_stochastic_depth_changes_from_draw_to_draw():
    model, variables = network(drop_path=0.5, drop_path_mode="sample")
    assert not np.allclose(train(model, variables, 0)[0], train(model, variables, 1)[0])
    np.testing.assert_array_equal(train(model, variables, 0)[0], train(model, variables, 0)[0])


@pytest.mark.long
@pytest.mark.parametrize(
    ("act", "norm"),
    [("relu", "group"), *((act, "none") for act in layers.ACTIVATIONS), ("silu", "batch")],
)
def test_activations_and_norms_build_and_differ(act, norm):
    model, variables = network(act=act, norm=norm)
    assert ("batch_stats" in variables) == (norm == "batch")
    kernels = [p[-1].key for p, _ in jax.tree_util.tree_leaves_with_path(variables["params"])]
    assert ("scale" in kernels) == (norm != "none")
    conv1 = variables["params"]["stage2_block1"]["conv1"]
    assert ("bias" in conv1) == (norm == "none")
    logits, _ = train(model, variables)
    assert np.isfinite(logits).all()
    if act != "relu":
        reference, _ = network(norm=norm)
        assert not np.allclose(logits, train(reference, variables)[0])


@pytest.mark.parametrize("init", layers.INITS)
def test_kernel_initialisations_have_their_variance(init):
    variance = {
        "he_fan_out": 2 / (9 * 64),
        "he_fan_in": 2 / (9 * 32),
        "glorot": 2 / (9 * 96),
        "lecun": 1 / (9 * 32),
        "gaussian": 1e-4,
    }[init]
    kernel = layers.INITS[init](jax.random.key(0), (3, 3, 32, 64))
    np.testing.assert_allclose(np.var(kernel), variance, rtol=0.05)
    # Untruncated: of 18,432 normal numbers some are beyond three standard deviations.
    assert np.abs(kernel).max() > 3 * variance**0.5


@pytest.mark.parametrize(
    ("overrides", "right"),
    [
        ({"skip": "Z"}, "'exclusive_gating'"),
        ({"skip": "dropout", "shortcut": "none"}, "'A', 'B' or 'C'"),
        ({"drop_path": 0.5, "shortcut": "none"}, "'A', 'B' or 'C'"),
        ({"drop_path": 1.0}, "less than 1"),
        ({"drop_path_mode": "Z"}, "'batch', 'sample'"),
        ({"form": "d"}, "'a', 'b', 'c'"),
        ({"act": "gelu"}, "'leaky_relu', 'silu'"),
        ({"norm": "layer"}, "'batch', 'group', 'none'"),
        ({"norm": "none", "zero_init_last": True}, "'batch' or 'group'"),
        ({"kernel_init": "zeros"}, "'glorot'"),
    ],
)
def test_wrong_choices_are_told_what_would_be_right(overrides, right):
    with pytest.raises(ValueError, match=right):
        resflax.create_model("cifar_resnet20", **overrides)


def test_wide_resnets_have_depths_of_6n_plus_4():
    with pytest.raises(ValueError, match=r"6n \+ 4: 10, 16, 22, 28"):
        resflax.create_model("wrn28_10", depth=29)
