"""What comes out of every part of a network, by name, for every family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resflax

pytestmark = pytest.mark.devices(1, 8, long=8)

NETWORKS = {
    "resnet50": (
        {"depth": 14, "num_filters": 8},
        64,
        {
            "stem": (16, 16, 8),
            "stage2": (16, 16, 32),
            "stage3": (8, 8, 64),
            "stage4": (4, 4, 128),
            "stage5": (2, 2, 256),
            "pooled": (256,),
        },
    ),
    "cifar_preact_resnet110": (
        {"depth": 14, "num_filters": 4, "scan": 2},
        9,
        {
            "stem": (9, 9, 4),
            "stage2": (9, 9, 4),
            "stage3": (5, 5, 8),
            "stage4": (3, 3, 16),
            "pooled": (16,),
        },
    ),
    "cifar_densenet40_k12": (
        {"depth": 10, "growth_rate": 4},
        16,
        {
            "stem": (16, 16, 16),
            "block1": (16, 16, 24),
            "block2": (8, 8, 32),
            "block3": (4, 4, 40),
            "pooled": (40,),
        },
    ),
    "cifar_nin": (
        {},
        8,
        {"block1": (8, 8, 96), "block2": (4, 4, 192), "block3": (2, 2, 192)},
    ),
    "vgg11": (
        {"num_filters": 2, "fc_units": 8},
        32,
        {
            **{f"stage{i}": (64 >> i, 64 >> i, min(1 << i, 16)) for i in range(1, 6)},
            "fc6": (8,),
            "fc7": (8,),
        },
    ),
    "alexnet_owt": (
        {"widths": (4, 6, 8, 6, 4), "fc_units": 8},
        64,
        {
            "conv1": (15, 15, 4),
            "conv2": (7, 7, 6),
            "conv3": (3, 3, 8),
            "conv4": (3, 3, 6),
            "conv5": (3, 3, 4),
            "fc6": (8,),
            "fc7": (8,),
        },
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_named_and_end_in_the_logits(name):
    overrides, size, expected = NETWORKS[name]
    model = resflax.create_model(name, num_classes=3, **overrides)
    images = jax.random.normal(jax.random.key(1), (2, size, size, 3))
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0, impl="rbg"), images)
    apply = functools.partial(model.apply, train=False)
    features = jax.jit(functools.partial(apply, features=True))(variables, images)
    shapes = {name: value.shape[1:] for name, value in features.items()}
    assert shapes == expected | {"logits": (3,)}
    np.testing.assert_allclose(
        features["logits"], jax.jit(apply)(variables, images), rtol=1e-5, atol=1e-6
    )
    head = variables["params"]["head"]
    if "pooled" in features:
        logits = features["pooled"] @ head["kernel"] + head["bias"].reshape(1, -1)
        np.testing.assert_allclose(features["logits"], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.first(1)
@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_what_the_modules_give_out(name):
    overrides, size, expected = NETWORKS[name]
    # A loop's blocks are not seen.
    overrides = {**overrides, "scan": 0} if "scan" in overrides else overrides
    model = resflax.create_model(name, num_classes=3, **overrides)
    images = jax.random.normal(jax.random.key(1), (2, size, size, 3))
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0, impl="rbg"), images
    )
    apply = functools.partial(model.apply, train=False, features=True, capture_intermediates=True)
    features, captured = jax.jit(apply)(variables, images)
    outputs = {k: v["__call__"][0] for k, v in captured["intermediates"].items() if k[0] != "_"}
    for feature in expected.keys() - {"pooled"}:
        # That of a stage is its last block's; a dense block's ends in its last layer's.
        module = max(m for m in outputs if m == feature or m.startswith(f"{feature}_"))
        output = outputs[module]
        if feature.startswith(("conv", "fc")):
            output = jax.nn.relu(output)
        np.testing.assert_allclose(
            features[feature][..., -output.shape[-1] :], output, rtol=1e-5, atol=1e-6
        )


@pytest.mark.long
@pytest.mark.parametrize(("name", "size"), [("inception_resnet_v2", 107), ("inception_v3", 107)])
def test_the_parts_of_inception_nets_are_features(name, size):
    model = resflax.create_model(name, num_classes=3, scan=0)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)

    def features(images):
        variables = model.init(jax.random.key(0), images, train=False)
        return model.apply(variables, images, train=False, features=True)

    shapes = jax.eval_shape(features, images)
    assert shapes.keys() == {*model.parts(), "pooled", "logits"}
    counted = resflax.count(model, (size, size, 3))
    for name, shape in shapes.items():
        if name in counted.parts:
            assert shape.shape[1:] == counted.parts[name].output_shape


@pytest.mark.long
def test_a_new_head_keeps_the_features():
    ten, two = (
        resflax.create_model("cifar_resnet20", num_classes=n, depth=8, num_filters=4)
        for n in (10, 2)
    )
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    old = ten.init(jax.random.key(0), images, train=False)
    new = two.init(jax.random.key(7), images, train=False)
    params = {**old["params"], "head": new["params"]["head"]}
    a = ten.apply(old, images, train=False, features=True)
    b = two.apply({**old, "params": params}, images, train=False, features=True)
    np.testing.assert_array_equal(a["pooled"], b["pooled"])
    assert b["logits"].shape == (2, 2)
