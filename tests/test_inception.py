"""Tests of GoogLeNet, BN-Inception, Inception v3 and v4, and the Inception-ResNets."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resflax
from resflax.models import gates, inception, layers
from resflax.models.bn_inception import bn_inception
from resflax.models.googlenet import googlenet
from resflax.models.inception_resnet import ResidualInception, inception_resnet
from resflax.models.inception_v3 import inception_v3
from resflax.models.inception_v4 import inception_v4
from resflax.ops import pool

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

NETWORKS = {
    "googlenet": googlenet,
    "googlenet_bn": functools.partial(
        googlenet, batch_norm=True, kernel_5x5=3, pool4_window=2, dropout=0.2
    ),
    "bn_inception": bn_inception,
    "inception_v3": inception_v3,
    "inception_v4": inception_v4,
    "inception_resnet_v1": functools.partial(inception_resnet, variant="v1"),
    "inception_resnet_v2": functools.partial(inception_resnet, variant="v2"),
    "inception_resnet_v2_paper": functools.partial(inception_resnet, variant="v2_paper"),
}
SE = {"se_reduction": 16}


@functools.cache
def _counted(name, size=None, **overrides):
    size = size or (224 if name in ("googlenet", "googlenet_bn", "bn_inception") else 299)
    return resflax.count(NETWORKS[name](**overrides), (size, size, 3))


def _macs(counted):
    """Without the auxiliary classifiers, which do not run outside of training."""
    return sum(p.macs for name, p in counted.parts.items() if not name.endswith("_aux"))


@functools.cache
def _shapes(model, size):
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }


def _trained(module, x, **kwargs):
    """Variables as after some training: no scale is one and no bias or mean zero. In numpy."""
    shapes = jax.eval_shape(functools.partial(module.init, **kwargs), jax.random.key(0), x)
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        if path[-1].key == "kernel":
            return (rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5).astype("f")
        return (rng.uniform(-0.5, 0.5, leaf.shape) + (path[-1].key in ("scale", "var"))).astype("f")

    return jax.tree_util.tree_map_with_path(fill, shapes)


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- counts --------------------------------------------------------------------------------------


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("name", "overrides", "params", "gmacs"),
    [
        ("googlenet", {}, 6_998_552, 1.5827),  # recomputed; the paper says 1.5 G
        ("googlenet", {"aux_heads": True}, 13_378_280, 1.5827),  # recomputed
        ("googlenet_bn", {}, 6_624_904, 1.4984),  # torchvision
        ("googlenet_bn", {"aux_heads": True}, 13_004_888, 1.4984),  # torchvision
        ("googlenet_bn", {"kernel_5x5": 5}, 7_005_832, 1.5827),  # recomputed
        ("bn_inception", {}, 11_285_224, 2.0326),  # SENet's prototxt without the gates
        ("bn_inception", {"conv_bias": True}, 11_295_240, 2.0326),  # imgclsmob
        ("bn_inception", SE, 11_931_622, 2.0332),  # SENet's prototxt
        ("inception_v3", {}, 23_834_568, 5.7132),  # timm
        ("inception_v3", {"aux_heads": True}, 27_161_264, 5.7132),  # torchvision
        ("inception_v3", {"norm_scale": False}, 23_817_352, 5.7132),  # Keras
        ("inception_v3", SE, 25_496_188, 5.7149),  # recomputed
        ("inception_v4", {}, 42_679_816, 12.2540),  # timm
        pytest.param(  # recomputed
            *("inception_v4", {"norm_scale": False}, 42_648_232, 12.2540), marks=pytest.mark.slow
        ),
        (
            "inception_resnet_v1",
            {},
            22_756_328,
            6.2064,
        ),  # imgclsmob with 5 last blocks, no embedding
        ("inception_resnet_v2", {}, 55_843_464, 13.1558),  # timm
        pytest.param(  # Keras
            *("inception_resnet_v2", {"norm_scale": False}, 55_813_192, 13.1558),
            marks=pytest.mark.slow,
        ),
        ("inception_resnet_v2", SE, 64_387_444, 13.1643),  # recomputed
    ],
)
def test_counts_are_the_published_ones(name, overrides, params, gmacs):
    counted = _counted(name, **overrides)
    assert counted.params == params
    assert _macs(counted) / 1e9 == pytest.approx(gmacs, rel=1e-3)
    assert counted.output_shape == (1000,)


def _gates(*channels):
    return sum(2 * c * (c // 16) + c // 16 + c for c in channels)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("googlenet", [256, 480, 512, 512, 512, 528, 832, 832, 1024]),
        ("inception_v4", [384] * 4 + [1024] * 7 + [1536] * 3),
        ("inception_resnet_v1", [256] * 5 + [896] * 10 + [1792] * 5),
    ],
)
def test_gates_stand_on_the_channels_of_their_modules(name, channels):
    assert _counted(name, **SE).params == _counted(name).params + _gates(*channels)


@pytest.mark.long
def test_bn_inception_with_576_channels():
    # 32 channels fewer out of the projections of 4c and 4d: norms, and what reads them.
    at_14 = 32 * 576 + 32 * (96 + 128 + 160) + (608 * 128 - 576 * 96) + 32 * (128 + 192)
    at_7 = 32 * (352 + 192 + 160 + 128)
    counted, wide = _counted("bn_inception", width_4cd=576), _counted("bn_inception")
    assert counted.params == wide.params - at_14 - at_7 - 2 * 2 * 32
    assert counted.macs == wide.macs - at_14 * 14**2 - at_7 * 7**2


def _convs(*specs):
    """Parameters and MACs of (c_in, c_out, taps, side) convolutions with norms."""
    params = sum(c_in * c_out * taps + 2 * c_out for c_in, c_out, taps, _ in specs)
    return np.array([params, sum(i * o * taps * side**2 for i, o, taps, side in specs)])


def _up(c_in, c_out, side):
    """The same of a 1x1 convolution with a bias and no norm."""
    return np.array([c_in * c_out + c_out, c_in * c_out * side**2])


@pytest.mark.long
def test_inception_resnet_v2_of_the_paper_follows_from_its_figures():
    stem = _convs(
        *[(3, 32, 9, 149), (32, 32, 9, 147), (32, 64, 9, 147), (64, 96, 9, 73)],
        *[(160, 64, 1, 73), (64, 96, 9, 71), (160, 64, 1, 73), (64, 64, 7, 73), (64, 64, 7, 73)],
        *[(64, 96, 9, 71), (192, 192, 9, 35)],
    )
    block_a = _up(128, 384, 35) + _convs(
        *[(384, 32, 1, 35)] * 3, (32, 32, 9, 35), (32, 48, 9, 35), (48, 64, 9, 35)
    )
    reduction_a = _convs(
        *[(384, 384, 9, 17), (384, 256, 1, 35), (256, 256, 9, 35), (256, 384, 9, 17)]
    )
    block_b = _up(384, 1152, 17) + _convs(
        *[(1152, 192, 1, 17), (1152, 128, 1, 17), (128, 160, 7, 17), (160, 192, 7, 17)]
    )
    reduction_b = _convs(
        *[(1152, 256, 1, 17)] * 3,
        *[(256, 384, 9, 8), (256, 288, 9, 8), (256, 288, 9, 17), (288, 320, 9, 8)],
    )
    block_c = _up(448, 2144, 8) + _convs(
        *[(2144, 192, 1, 8)] * 2, (192, 224, 3, 8), (224, 256, 3, 8)
    )
    head = _up(2144, 1000, 1)
    total = stem + 5 * block_a + reduction_a + 10 * block_b + reduction_b + 5 * block_c + head
    counted = _counted("inception_resnet_v2_paper")
    np.testing.assert_array_equal([counted.params, counted.macs], total)


# --- tables --------------------------------------------------------------------------------------

# (side, channels) of what each part gives out, from the papers' tables and figures, in order.
V4_STEM = [(147, 64), (73, 160), (71, 192), (35, 384)]
OUTPUTS = {
    "googlenet": [
        *[(28, 192), (28, 256), (28, 480), (14, 480), (14, 512), (14, 512), (14, 512), (14, 528)],
        *[(14, 832), (7, 832), (7, 832), (7, 1024)],
    ],
    "bn_inception": [
        *[(28, 192), (28, 256), (28, 320), (14, 576), (14, 576), (14, 576), (14, 608), (14, 608)],
        *[(7, 1056), (7, 1024), (7, 1024)],
    ],
    "inception_v3": [
        *[(35, 192), (35, 256), (35, 288), (35, 288), *[(17, 768)] * 5],
        *[(8, 1280), (8, 2048), (8, 2048)],
    ],
    "inception_v4": [
        *[*V4_STEM, *[(35, 384)] * 4, (17, 1024), *[(17, 1024)] * 7, (8, 1536), *[(8, 1536)] * 3],
    ],
    "inception_resnet_v1": [(35, 256)] * 6 + [(17, 896)] * 11 + [(8, 1792)] * 6,
    "inception_resnet_v2": [
        *[(35, 192), *[(35, 320)] * 11, *[(17, 1088)] * 21, *[(8, 2080)] * 11, (8, 1536)],
    ],
    "inception_resnet_v2_paper": [
        *[*V4_STEM, *[(35, 384)] * 5, *[(17, 1152)] * 11, *[(8, 2144)] * 6],
    ],
}
OUTPUTS["googlenet_bn"] = OUTPUTS["googlenet"]


@pytest.mark.first(1)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_part_gives_out_the_channels_of_the_paper(name):
    parts = [p for part, p in _counted(name).parts.items() if part not in ("dropout", "head")]
    expected = [(side, side, channels) for side, channels in OUTPUTS[name]]
    assert [part.output_shape for part in parts] == expected


def _pools(model):
    """The pools of every part: name of the function and its arguments."""
    for name, part in model.parts().items():
        for branch in part.args[:1] if part.func is inception.Chain else part.args[0]:
            for spec in branch:
                if isinstance(spec, functools.partial) and "pool" in spec.func.__name__:
                    yield name, spec.func.__name__, *spec.keywords.values()


CEIL, SAME = ("max_pool", 3, 2, (0, 1)), ("max_pool", 3, 1, (1, 1))
UNPADDED = ("max_pool", 3, 2, (0, 0))


def test_pools_are_those_of_the_released_models():
    modules = [f"inception_{m}" for m in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]
    caffe = [("stem", *CEIL), ("stem", *CEIL), ("pool3", *CEIL), ("pool4", *CEIL)]
    assert sorted(_pools(googlenet())) == sorted(caffe + [(m, *SAME) for m in modules])
    assert ("pool4", "max_pool", 2, 2, (0, 1)) in _pools(NETWORKS["googlenet_bn"]())

    pools = [pool for pool in _pools(bn_inception()) if pool[1] == "max_pool"]
    assert [name for name, *_ in pools] == ["stem", "stem"] + [f"inception_{m}" for m in REDUCING]
    passing = ("max_pool", 3, 2, (0, 2))
    assert [tuple(pool) for _, *pool in pools] == [CEIL, CEIL, passing, passing, SAME]

    for model, counting in [
        (bn_inception(), True),  # Caffe
        (inception_v3(), True),  # torchvision
        (inception_v3(count_padding=False), False),  # TensorFlow
        (inception_v4(), False),
        (inception_resnet(), False),
    ]:
        averages = {tuple(pool) for _, *pool in _pools(model) if pool[0] == "avg_pool"}
        assert averages == {("avg_pool", 3, 1, 1, counting)}
    for name in ("inception_v3", "inception_v4", "inception_resnet_v1", "inception_resnet_v2"):
        pools = {tuple(pool) for _, *pool in _pools(NETWORKS[name]()) if pool[0] == "max_pool"}
        assert pools == {UNPADDED}


REDUCING = ("3c", "4e", "5b")


def test_residual_branches_are_scaled_as_in_the_released_code():
    def blocks(model):
        return {
            name: (part.args[1], part.keywords["act"])
            for name, part in model.parts().items()
            if part.func is ResidualInception
        }

    scales = {"a": 0.17, "b": 0.1, "c": 0.2}
    paper = blocks(inception_resnet("v2_paper"))
    assert paper == {name: (scales[name.split("_")[1][0]], True) for name in paper}
    released = blocks(inception_resnet("v2"))
    assert released.pop("block_c10") == (1.0, False)
    assert released == {name: (scales[name.split("_")[1][0]], True) for name in released}
    chosen = blocks(inception_resnet("v2", (1, 2, 1), scales=(1.0, 0.5, 0.3)))
    assert chosen == {
        "block_a1": (1.0, True),
        "block_b1": (0.5, True),
        "block_b2": (0.5, True),
        "block_c1": (1.0, False),
    }


# Checkpoints and scripts name parameters by these paths: a change here breaks them.
FROZEN = {
    ("inception_v3", "mixed_7b"): """
        branch1_conv1 1x1x1280x320
        branch2_conv1 1x1x1280x384 branch2_conv2a 1x3x384x384 branch2_conv2b 3x1x384x384
        branch3_conv1 1x1x1280x448 branch3_conv2 3x3x448x384
        branch3_conv3a 1x3x384x384 branch3_conv3b 3x1x384x384
        branch4_conv1 1x1x1280x192""",
    ("inception_v3", "mixed_6b"): """
        branch1_conv1 1x1x768x192
        branch2_conv1 1x1x768x128 branch2_conv2 1x7x128x128 branch2_conv3 7x1x128x192
        branch3_conv1 1x1x768x128 branch3_conv2 7x1x128x128 branch3_conv3 1x7x128x128
        branch3_conv4 7x1x128x128 branch3_conv5 1x7x128x192
        branch4_conv1 1x1x768x192""",
    ("inception_v4", "mixed_4a"): """
        branch1_conv1 1x1x160x64 branch1_conv2 3x3x64x96
        branch2_conv1 1x1x160x64 branch2_conv2 1x7x64x64 branch2_conv3 7x1x64x64
        branch2_conv4 3x3x64x96""",
    ("inception_v4", "inception_c1"): """
        branch1_conv1 1x1x1536x256
        branch2_conv1 1x1x1536x384 branch2_conv2a 1x3x384x256 branch2_conv2b 3x1x384x256
        branch3_conv1 1x1x1536x384 branch3_conv2 3x1x384x448 branch3_conv3 1x3x448x512
        branch3_conv4a 1x3x512x256 branch3_conv4b 3x1x512x256
        branch4_conv1 1x1x1536x256""",
    ("inception_resnet_v2", "block_b1"): """
        branch1_conv1 1x1x1088x192
        branch2_conv1 1x1x1088x128 branch2_conv2 1x7x128x160 branch2_conv3 7x1x160x192
        up 1x1x384x1088""",
}


@pytest.mark.first(1)
@pytest.mark.parametrize(("name", "part"), FROZEN)
def test_parameter_paths_and_shapes_of_a_module_are_frozen(name, part):
    words = FROZEN[name, part].split()
    expected = {}
    for conv, shape in zip(words[::2], words[1::2], strict=True):
        *_, filters = shape = tuple(map(int, shape.split("x")))
        if conv == "up":
            expected |= {"up/kernel": shape, "up/bias": (filters,)}
        else:
            norm = {f"{conv}/norm/{leaf}": (filters,) for leaf in ("scale", "bias")}
            expected |= {f"{conv}/conv/kernel": shape, **norm}
    channels = {"block_b1": 1088, "inception_c1": 1536, "mixed_7b": 2048, "mixed_6b": 768}
    if part != "mixed_4a":  # the stem has no gates
        c = channels[part]
        expected |= {"se/squeeze/kernel": (c, c // 16), "se/squeeze/bias": (c // 16,)}
        expected |= {"se/excite/kernel": (c // 16, c), "se/excite/bias": (c,)}
    shapes = _shapes(NETWORKS[name](**SE), 75)
    prefix = f"params/{part}/"
    actual = {p.removeprefix(prefix): s for p, s in shapes.items() if p.startswith(prefix)}
    assert actual == expected


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("name", "overrides", "parts"),
    [
        (
            "googlenet",
            {"aux_heads": True},
            "stem inception_3a inception_3b inception_4a inception_4a_aux inception_4b "
            "inception_4c inception_4d inception_4d_aux inception_4e inception_5a inception_5b "
            "head",
        ),
        (
            "bn_inception",
            SE,
            "stem inception_3a inception_3b inception_3c inception_4a inception_4b inception_4c "
            "inception_4d inception_4e inception_5a inception_5b head",
        ),
        (
            "inception_v3",
            {},
            "stem mixed_5b mixed_5c mixed_5d mixed_6a mixed_6b mixed_6c mixed_6d mixed_6e mixed_7a "
            "mixed_7b mixed_7c head",
        ),
        (
            "inception_v4",
            {},
            "stem mixed_3a mixed_4a mixed_5a inception_a1 inception_a2 inception_a3 inception_a4 "
            "reduction_a inception_b1 inception_b2 inception_b3 inception_b4 inception_b5 "
            "inception_b6 inception_b7 reduction_b inception_c1 inception_c2 inception_c3 head",
        ),
        (
            "inception_resnet_v2",
            {"stage_sizes": (1, 2, 1)},
            "stem mixed_5b block_a1 reduction_a block_b1 block_b2 reduction_b block_c1 conv_7b "
            "head",
        ),
    ],
)
def test_the_names_of_parts_are_frozen(name, overrides, parts):
    counted = _counted(name, **overrides)
    assert " ".join(part for part, p in counted.parts.items() if p.params) == parts


@pytest.mark.long
def test_paths_of_stems_and_auxiliary_classifiers_are_frozen():
    shapes = _shapes(googlenet(aux_heads=True), 224)
    assert not any(path.startswith("batch_stats") for path in shapes)
    assert {path: s for path, s in shapes.items() if "/stem/" in path or "4d_aux" in path} == {
        "params/stem/conv1/conv/kernel": (7, 7, 3, 64),
        "params/stem/conv1/conv/bias": (64,),
        "params/stem/conv2/conv/kernel": (1, 1, 64, 64),
        "params/stem/conv2/conv/bias": (64,),
        "params/stem/conv3/conv/kernel": (3, 3, 64, 192),
        "params/stem/conv3/conv/bias": (192,),
        "params/inception_4d_aux/conv1/conv/kernel": (1, 1, 528, 128),
        "params/inception_4d_aux/conv1/conv/bias": (128,),
        "params/inception_4d_aux/hidden/kernel": (2048, 1024),
        "params/inception_4d_aux/hidden/bias": (1024,),
        "params/inception_4d_aux/head/kernel": (1024, 1000),
        "params/inception_4d_aux/head/bias": (1000,),
    }


@pytest.mark.long
@pytest.mark.parametrize("name", ["googlenet_bn", "inception_v3", "inception_resnet_v1"])
def test_without_scale_no_norm_has_one(name):
    scaled, unscaled = (_shapes(NETWORKS[name](norm_scale=s), 75) for s in (True, False))
    assert {path for path in scaled if not path.endswith("/scale")} == set(unscaled)
    assert set(scaled) - set(unscaled)


# --- images --------------------------------------------------------------------------------------


@pytest.mark.first(1)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [(2, 96, 131, 3), (1, 119, 75, 1)])
def test_odd_and_even_sizes_fit(name, shape):
    # One block of a kind sees all sizes that there are.
    few = {"stage_sizes": (1, 1, 1)} if "resnet" in name or name == "inception_v4" else {}
    model = NETWORKS[name](num_classes=7, **few)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    out, _ = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False), image
    )
    assert (out.shape, out.dtype) == ((shape[0], 7), jnp.float32)


@pytest.mark.long
def test_pools_of_padded_networks_round_up_as_caffe_does():
    # 113 -> 57 -> 28 -> 14 -> 7 -> 4; 117 -> 59 -> 29 -> 14.
    for name in ("googlenet", "googlenet_bn", "bn_inception"):
        sides = [_counted(name, 113).parts[f"inception_{m}"].output_shape[:2] for m in ("3a", "4a")]
        assert sides == [(14, 14), (7, 7)]
        assert _counted(name, 117).parts["inception_3a"].output_shape[:2] == (14, 14)
    assert _counted("googlenet_bn", 113).parts["inception_5a"].output_shape[:2] == (4, 4)
    assert _counted("googlenet", 113).parts["inception_5a"].output_shape[:2] == (3, 3)
    # 7 positions: convolutions with a stride of 2 give 4, and the pool beside them follows.
    assert _counted("bn_inception", 113).parts["inception_4e"].output_shape[:2] == (4, 4)


@pytest.mark.parametrize(
    ("name", "overrides", "shape", "right"),
    [
        ("googlenet", {}, (1, 31, 64, 3), "at least 32 for GoogLeNet"),
        ("bn_inception", {}, (1, 64, 31, 3), "at least 32 for BNInception"),
        ("inception_v3", {}, (1, 74, 75, 3), "at least 75 for InceptionV3"),
        ("inception_v4", {}, (1, 75, 74, 3), "at least 75 for InceptionV4"),
        ("inception_resnet_v1", {}, (1, 74, 74, 3), "at least 75 for InceptionResNet"),
        ("inception_v3", {}, (299, 299, 3), r"\[N, H, W, C\]"),
        ("googlenet", {"aux_heads": True}, (1, 78, 79, 3), "at least 79 pixels; here 4x5 "),
        ("inception_v3", {"aux_heads": True}, (1, 298, 299, 3), "at least 299 pixels; here 16x17"),
    ],
)
def test_wrong_images_are_told_what_would_be_right(name, overrides, shape, right):
    with pytest.raises(ValueError, match=right):
        jax.eval_shape(
            lambda x: NETWORKS[name](**overrides).init(jax.random.key(0), x, train=False),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        )


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("name", "size"), [("googlenet", 79), ("bn_inception", 32), ("inception_v3", 75)]
)
def test_the_smallest_images_fit(name, size):
    overrides = {"aux_heads": True} if name == "googlenet" else {}
    assert _counted(name, size, **overrides).output_shape == (1000,)


@pytest.mark.parametrize(
    ("name", "overrides", "right"),
    [
        ("googlenet", {"kernel_5x5": 4}, "odd: 5, or 3"),
        ("googlenet", {"pool4_window": 4}, "3 .* or 2"),
        ("googlenet", {"norm_scale": False}, "batch_norm True"),
        ("googlenet", {"aux_dropout": 1.0}, "less than 1"),
        ("bn_inception", {"width_4cd": 480}, "608 .* 576"),
        ("inception_v3", {"num_classes": 0}, "at least 1"),
        ("inception_v3", {"dropout": -0.1}, "at least 0"),
        ("inception_v3", {"se_gate": "Z"}, "'sigmoid', 'tanh', 'relu'"),
        ("inception_v3", {"se_squeeze": "Z"}, "'avg', 'max', 'none'"),
        ("inception_v3", {"se_reduction": 257}, "at most 256"),
        ("inception_v4", {"se_reduction": 385}, "at most 384"),
        ("inception_v4", {"se_reduction": -1}, "0 .*or more"),
        ("inception_resnet_v2", {"se_reduction": 321}, "at most 320"),
        ("inception_resnet_v1", {"variant": "v3"}, "'v1', 'v2', 'v2_paper'"),
        ("inception_resnet_v1", {"stage_sizes": (5, 10)}, r"\(5, 10, 5\)"),
        ("inception_resnet_v2", {"stage_sizes": (1, 0, 1)}, r"at least 1.*\(10, 20, 10\)"),
        ("inception_resnet_v2", {"scales": (0.1,)}, "three numbers"),
        ("inception_v4", {"stage_sizes": (4, 7)}, r"3 numbers .*\(4, 7, 3\)"),
    ],
)
def test_wrong_choices_are_told_what_would_be_right(name, overrides, right):
    with pytest.raises(ValueError, match=right) as caught:
        NETWORKS[name](**overrides)
    assert next(iter(overrides)) in str(caught.value)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.long
def test_branches_follow_one_another():
    x = _normal(0, 2, 5, 6, 3)
    norm = functools.partial(nn.BatchNorm, use_running_average=True)
    handed_down = inception.Layers(layers.Conv, norm, None)
    a, b, c = inception.Conv(4), inception.Conv(5, (1, 3)), inception.Conv(2, (3, 1))
    part = inception.mixed((a,), (a, inception.Fork((b, c))), (inception.SAME_MAX_POOL,))
    model = part(layers=handed_down)
    variables = _trained(model, x)
    actual = jit(model.apply)(variables, x)

    def conv(name, spec, y):
        only = {kind: leaves[name] for kind, leaves in variables.items()}
        return jit(inception.ConvNorm(spec, handed_down).apply)(only, y)

    y = conv("branch2_conv1", a, x)
    expected = [
        conv("branch1_conv1", a, x),
        conv("branch2_conv2a", b, y),
        conv("branch2_conv2b", c, y),
        inception.SAME_MAX_POOL(x),
    ]
    np.testing.assert_allclose(actual, np.concatenate(expected, -1), rtol=0, atol=1e-5)


def _residual(variables, x, scale, gate=None, act=False):
    norm = functools.partial(nn.BatchNorm, use_running_average=True)
    model = ResidualInception(BRANCHES, scale, inception.Layers(layers.Conv, norm, gate), act)
    variables = _trained(model, x) if variables is None else variables
    return variables, np.asarray(jit(model.apply)(variables, x))


BRANCHES = ((inception.Conv(4),), (inception.Conv(2), inception.Conv(3, 3)))


@pytest.mark.long
def test_a_residual_branch_is_scaled_gated_and_added():
    x = _normal(0, 2, 5, 6, 8)
    variables, once = _residual(None, x, 1.0)
    assert once.min() < -0.1
    _, scaled = _residual(variables, x, 0.2)
    np.testing.assert_allclose(scaled - x, 0.2 * (once - x), rtol=0, atol=1e-5)
    _, activated = _residual(variables, x, 0.2, act=True)
    np.testing.assert_array_equal(activated, np.maximum(scaled, 0))

    # Gates of a half: half the branch, and all of x.
    gate = functools.partial(gates.SqueezeExcite, 2)
    gated_variables, _ = _residual(None, x, 0.2, gate)
    gated_variables["params"]["se"]["excite"]["kernel"] *= 0
    gated_variables["params"]["se"]["excite"]["bias"] *= 0
    ungated = {"params": {k: v for k, v in gated_variables["params"].items() if k != "se"}}
    ungated["batch_stats"] = gated_variables["batch_stats"]
    _, gated = _residual(gated_variables, x, 0.2, gate)
    _, plain = _residual(ungated, x, 0.2)
    np.testing.assert_allclose(gated - x, (plain - x) / 2, rtol=0, atol=1e-5)


class Tiny(inception.InceptionNet):
    """One part of every kind."""

    smallest_image = 8

    def parts(self):
        conv, average = inception.Conv, functools.partial(pool.avg_pool, window=2, stride=2)
        return {
            "stem": inception.chain(conv(8, 3, 2), average),
            "mixed": inception.mixed((conv(4, (1, 3)),), (inception.SAME_MAX_POOL, conv(4))),
            "block": functools.partial(ResidualInception, BRANCHES, 0.2),
        }


@pytest.fixture(scope="module")
def small():
    x = _normal(0, 4, 16, 16, 3)
    model = Tiny(num_classes=5, se_reduction=2, bn_momentum=0.75)
    return model, _trained(model, x, train=False), x


@pytest.mark.long
def test_training_alone_updates_the_statistics(small):
    model, variables, x = small
    old = variables["batch_stats"]
    _, same = jit(functools.partial(model.apply, train=False, mutable="batch_stats"))(variables, x)
    jax.tree.map(np.testing.assert_array_equal, same["batch_stats"], old)
    _, new = jit(functools.partial(model.apply, train=True, mutable="batch_stats"))(variables, x)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), new["batch_stats"], old)
    assert all(jax.tree.leaves(changed))


@pytest.mark.long
def test_bfloat16_computes_in_bfloat16_and_keeps_the_rest_in_float32(small):
    model, variables, x = small
    exact = jit(functools.partial(model.apply, train=False))(variables, x)
    half = model.clone(dtype=jnp.bfloat16)
    apply = functools.partial(half.apply, train=False, capture_intermediates=True)
    logits, inner = jit(apply)(variables, x)
    assert logits.dtype == jnp.float32
    images = [y for y in jax.tree.leaves(inner) if y.ndim == 4]
    assert {str(y.dtype) for y in images} == {"bfloat16"}
    assert 0 < np.abs(logits - exact).max() / np.abs(exact).max() < 0.1


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "heads", "size"),
    [("googlenet", 2, 224), ("googlenet_bn", 2, 80), ("inception_v3", 1, 299)],
)
def test_auxiliary_logits_are_sown_in_training_alone(name, heads, size):
    model = NETWORKS[name](num_classes=7, aux_heads=True, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((3, size, size, 3), jnp.float32)

    def run(x, train):
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        variables = model.init(keys, x, train=train)
        assert set(variables) <= {"params", "batch_stats"}
        mutable = ["batch_stats", "intermediates"]
        return variables, *model.apply(variables, x, train=train, mutable=mutable, rngs=keys)

    trained, logits, updates = jax.eval_shape(functools.partial(run, train=True), x)
    assert (logits.shape, logits.dtype) == ((3, 7), jnp.float32)
    sown = updates["intermediates"]["aux_logits"]
    assert [(y.shape, y.dtype) for y in sown] == [((3, 7), jnp.float32)] * heads

    evaluated, logits, updates = jax.eval_shape(functools.partial(run, train=False), x)
    assert "intermediates" not in updates
    assert logits.shape == (3, 7)
    assert jax.tree.structure(trained) == jax.tree.structure(evaluated)


@pytest.mark.long
def test_auxiliary_classifiers_do_not_change_the_logits():
    x = _normal(0, 1, 79, 79, 3)
    with_heads = googlenet(num_classes=5, aux_heads=True)
    variables = _trained(with_heads, x, train=False)
    logits, without = (
        jit(functools.partial(m.apply, train=False))(variables, x)
        for m in (with_heads, googlenet(num_classes=5))
    )
    np.testing.assert_array_equal(logits, without)
    assert np.ptp(logits) > 0
