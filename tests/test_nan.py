"""A number that is not one stays so: through every kind of network, compiled as users run it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resflax
from resflax import metrics
from resflax.models import gates
from resflax.ops import activation, native, pool

# Every kind of block, norm, activation and pool, each in the smallest network.
PLAIN = {"depth": 8, "num_filters": 16}
NETWORKS = {
    "resnet": ("cifar_resnet20", PLAIN),
    "plain": ("cifar_resnet20", PLAIN | {"shortcut": "none"}),
    "without norms": ("cifar_resnet20", PLAIN | {"norm": "none"}),
    "group norm": ("cifar_resnet20", PLAIN | {"norm": "group"}),
    "preact": ("cifar_resnet20", PLAIN | {"unit": "full_preact", "shortcut": "B"}),
    "leaky": ("cifar_resnet20", PLAIN | {"act": "leaky_relu"}),
    "stem": ("cifar_resnet20", PLAIN | {"stem": "imagenet"}),
    "resnext": ("cifar_resnext29_8x64d", {"depth": 11, "num_filters": 16, "cardinality": 4}),
    "se": ("cifar_se_resnet110", PLAIN | {"se_reduction": 4, "se_squeeze": "max"}),
    "relu gates": ("cifar_se_resnet110", PLAIN | {"se_reduction": 4, "se_gate": "relu"}),
    "densenet": ("cifar_densenet40_k12", {"depth": 10}),
    "nin": ("cifar_nin", {"widths": ((16, 8), (8, 8), (8,))}),
    "vgg": ("vgg11", {"num_filters": 2, "fc_units": 8}),
    "alexnet": ("alexnet", {"fc_units": 8}),
}
QUICK = ("resnet", "preact", "leaky", "stem", "resnext", "se", "densenet", "vgg")
SIDES = {"alexnet": 96, "vgg": 32, "nin": 32, "stem": 64}


def loss_and_logits(model, train):
    @jax.jit
    def run(variables, images):
        logits, _ = model.apply(
            variables,
            images,
            train=train,
            mutable=["batch_stats", "intermediates"],
            rngs={"dropout": jax.random.key(0)},
        )
        return jnp.mean(metrics.cross_entropy(logits, jnp.zeros(len(images), jnp.int32))), logits

    return run


def variables_of(model, side):
    """Positive weights, so small that 600 blocks do not overflow: every activation is alive."""
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)

    def weights(x):
        return np.full(x.shape, 0.5 / max(*x.shape, math.prod(x.shape[:-1])), x.dtype)

    return jax.tree.map(weights, shapes)


def spoilt(variables):
    """The same with one NaN, in the first kernel."""
    leaves, tree = jax.tree.flatten_with_path(variables["params"])
    kernels = [i for i, (path, leaf) in enumerate(leaves) if leaf.ndim == 4 and leaf.shape[2] == 3]
    leaves = [leaf.copy() for _, leaf in leaves]
    leaves[kernels[0]].flat[0] = np.nan
    return variables | {"params": jax.tree.unflatten(tree, leaves)}


def check(model, side, train):
    run = loss_and_logits(model, train)
    variables = variables_of(model, side)
    images = np.ones((2, side, side, 3), np.float32)
    loss, logits = run(variables, images)
    assert np.isfinite(loss)
    assert np.isfinite(logits).all()
    loss, logits = run(spoilt(variables), images)
    assert np.isnan(loss)
    assert np.isnan(logits).all()
    images[0, side // 2, side // 2, 1] = np.nan
    loss, logits = run(variables, images)
    assert np.isnan(loss)
    assert np.isnan(logits[0]).all()


@pytest.fixture(
    params=[True, pytest.param(False, marks=pytest.mark.long)], ids=["kernels", "compositions"]
)
def lowering(request, monkeypatch):
    if request.param and not native.usable():
        pytest.skip("there are no compiled kernels")
    if not request.param:
        monkeypatch.setattr(native, "usable", lambda: False)


# Statistics of a batch carry NaN by themselves: the evaluation is where activations matter.
CASES = [
    pytest.param(name, False, marks=[] if name in QUICK else pytest.mark.long) for name in NETWORKS
] + [("resnet", True), pytest.param("se", True, marks=pytest.mark.long)]


@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize(("name", "train"), CASES)
def test_it_comes_out_of_every_kind_of_network(name, train):
    family, overrides = NETWORKS[name]
    check(resflax.create_model(family, num_classes=5, **overrides), SIDES.get(name, 16), train)


@pytest.mark.slow
@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize("name", resflax.list_models())
def test_it_comes_out_of_every_network_of_the_zoo(name):
    model = resflax.create_model(name, num_classes=5)
    side = 32 if name.startswith(("cifar", "wrn")) else 96
    check(model, side, train=False)


# XLA fuses a maximum with the sum over it from 4,096 numbers on, and then loses NaN.
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: activation.relu(2 * x + 1).mean(),
        lambda x: activation.relu(x).sum((1, 2)),
        lambda x: pool.max_pool(2 * x, 3, 2, (1, 1), lowering="index").mean(),
        lambda x: jax.vjp(lambda x: pool.max_pool(x, 3, 2, (1, 1), lowering="index"), x)[0].mean(),
        lambda x: gates.SQUEEZES["max"](x),
    ],
    ids=["mean", "sums", "pool", "pool with a gradient", "global pool"],
)
def test_a_maximum_that_is_summed_keeps_it(fn, everywhere):
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 16)).astype(np.float32)
    fn = jax.jit(fn)
    assert np.isfinite(fn(x)).all()
    for place in (slice(None),) if everywhere else (0, 5000, -1):
        one = x.copy()
        one.flat[place] = np.nan
        assert np.isnan(fn(one)).any()


def test_the_rectifier_has_the_gradient_of_a_positive_part():
    x = jnp.array([-2.0, -0.0, 0.0, 3.0])
    np.testing.assert_array_equal(activation.relu(x), [0, 0, 0, 3])
    np.testing.assert_array_equal(jax.grad(lambda x: activation.relu(x).sum())(x), [0, 0, 0, 1])
    _, tangent = jax.jvp(activation.relu, (x,), (jnp.ones(4),))
    np.testing.assert_array_equal(tangent, [0, 0, 0, 1])
