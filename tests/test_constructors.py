"""Parts from outside the package: a constructor of anybody's own for every axis of a ResNet."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resflax
from resflax import UserError, create_model
from resflax.analysis import gates, taps
from resflax.models import axes, constructors, layers
from resflax.models.gates import Gate
from resflax.ops import pool

IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
# Compiling takes nearly all of the time here.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tiny(**overrides):
    return create_model("cifar_resnet20", **{"depth": 8, "num_filters": 4, **overrides})


def shapes(model, images=IMAGES):
    """The shapes of the network's variables, by their paths."""
    init = functools.partial(model.init, train=False)
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(init, jax.random.key(0), images))
    return {"/".join(k.key for k in path[1:]): leaf.shape for path, leaf in leaves}


@functools.cache
def initialised(model):
    return jit(functools.partial(model.init, train=False))(jax.random.key(0, impl="rbg"), IMAGES)


def logits(model, variables=None):
    """In training mode, with the statistics that come of it."""

    @jit
    def apply(variables):
        return model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])

    return apply(initialised(model) if variables is None else variables)


def assert_same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# --- each axis -----------------------------------------------------------------------------------


class Half(nn.Module):
    """Neither a Gate nor deferred, and without any field."""

    @nn.compact
    def __call__(self, x):
        assert isinstance(x, jax.Array)
        return x * 0.5


class Halves(nn.Module):
    """A skip that asks for nothing."""

    @nn.compact
    def __call__(self, x, shortcut, residual):
        return shortcut * 0.5, residual * 0.25


@pytest.mark.first(3)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        # The variables of flax's batch norm have the names of ours.
        ({}, {"norm": nn.BatchNorm}),
        ({"skip": "constant_scaling", "residual_scale": 0.5}, {"gate": Half}),
        ({"act": "tanh"}, {"act": jnp.tanh}),
        (
            {"skip": "constant_scaling", "skip_scale": 0.5, "residual_scale": 0.25},
            {"skip": Halves},
        ),
        ({"kernel_init": "lecun"}, {"kernel_init": layers.INITS["lecun"]}),
        ({"shortcut": "B"}, {"shortcut": functools.partial(axes.SHORTCUTS["B"])}),
        ({"norm": "group"}, {"norm": functools.partial(nn.GroupNorm, num_groups=4)}),
    ],
)
def test_a_part_from_outside_computes_what_ours_does(ours, theirs):
    ours, theirs = tiny(num_classes=3, **ours), tiny(num_classes=3, **theirs)
    if shapes(ours) == shapes(theirs):
        assert_same(logits(ours), logits(theirs, initialised(ours)))
    else:  # of other names; but the same initial values
        assert_same(logits(ours), logits(theirs))


class Scaled(nn.Module):
    """A gate that asks for all it can be told."""

    conv: constructors.ModuleDef
    norm: constructors.ModuleDef
    act: object
    train: bool
    dtype: jnp.dtype
    units: int = 3

    @nn.compact
    def __call__(self, x):
        assert x.dtype == self.dtype
        y = self.norm(name="norm")(self.conv(self.units, 3, name="conv")(x))
        assert isinstance(y, jax.Array)
        y = nn.Dense(x.shape[-1], name="dense")(self.act(y + 1.0))
        return x * nn.sigmoid(y)


def test_a_gate_gets_what_it_has_fields_for():
    found = shapes(tiny(gate=functools.partial(Scaled, units=2), dtype=jnp.bfloat16))
    assert found["stage3_block1/gate/conv/kernel"] == (3, 3, 8, 2)
    assert found["stage3_block1/gate/norm/mean"] == (2,)
    assert found["stage4_block1/gate/dense/kernel"] == (2, 16)
    assert not any("/se/" in path for path in found)
    only = shapes(tiny(gate=Scaled, se_stages=(4,)))
    assert {path.split("/")[0] for path in only if "/gate/" in path} == {"stage4_block1"}


def test_a_network_gives_float32_of_a_gate_in_another_type():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x.astype(jnp.float32)

    model = tiny(gate=Wide, dtype=jnp.bfloat16)
    features = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False, features=True)[0],
        IMAGES,
    )
    assert features["stage2"].dtype == jnp.bfloat16
    assert features["logits"].dtype == jnp.float32


class Strided(nn.Module):
    """A shortcut with a layer of flax."""

    filters: int
    stride: int

    @nn.compact
    def __call__(self, x):
        return nn.Conv(self.filters, (1, 1), (self.stride, self.stride), name="conv")(x)


class Everywhere(Strided):
    everywhere = True


def test_a_shortcut_stands_where_the_shape_changes_or_everywhere():
    blocks = {path.split("/")[0] for path in shapes(tiny(shortcut=Strided)) if "/shortcut/" in path}
    assert blocks == {"stage3_block1", "stage4_block1"}
    found = shapes(tiny(shortcut=Everywhere))
    assert found["stage2_block1/shortcut/conv/kernel"] == (1, 1, 4, 4)


class Patches(nn.Module):
    filters: int

    @nn.compact
    def __call__(self, images):
        return nn.Conv(self.filters, (4, 4), (4, 4), name="conv")(images)


def test_a_stem_takes_images_of_any_size():
    images = jnp.zeros((1, 256, 12, 3))
    assert shapes(tiny(stem=Patches), images)["stem/conv/kernel"] == (4, 4, 3, 4)


class Mean(nn.Module):
    stride: int

    @nn.compact
    def __call__(self, x):
        return pool.avg_pool(x, self.stride, self.stride)


def test_a_pool_takes_the_place_of_the_stride():
    model = tiny(downsample=Mean)
    assert shapes(model) == shapes(tiny())
    counted, usual = (resflax.count(m, (8, 8, 3)).parts["stage3_block1"] for m in (model, tiny()))
    assert "downsample" in counted.parts
    # Four times the positions of the first convolution.
    assert counted.macs == usual.macs + 3 * usual.parts["conv1"].macs
    assert counted.output_shape == usual.output_shape


# --- what is asked of a module -------------------------------------------------------------------


class Attention(Gate):
    """Efficient channel attention, arXiv 1910.03151, with a layer of flax."""

    @nn.compact
    def gates(self, x):
        means = jnp.mean(x, axis=(1, 2))[..., None]
        return nn.sigmoid(nn.Conv(1, (3,), use_bias=False, name="conv")(means)[..., 0])


def test_a_gate_that_says_so_is_found():
    model = tiny(gate=Attention)
    variables = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), IMAGES
    )
    apply = functools.partial(model.apply, train=False)
    found = taps.shapes(apply, gates.select)(variables, IMAGES)
    assert {name: p.output.shape for name, p in found.items()} == {
        f"stage{stage}_block1": (2, 4 * 2 ** (stage - 2)) for stage in (2, 3, 4)
    }
    other = tiny(gate=Half)
    assert (
        taps.shapes(functools.partial(other.apply, train=False), gates.select)(
            jax.eval_shape(functools.partial(other.init, train=False), jax.random.key(0), IMAGES),
            IMAGES,
        )
        == {}
    )


def test_layers_of_flax_are_counted():
    part = resflax.count(tiny(gate=Attention), (8, 8, 3)).parts["stage3_block1"].parts["gate"]
    assert (part.params, part.macs, part.gate) == (3, 3 * 8, True)
    shortcut = (
        resflax.count(tiny(shortcut=Strided), (8, 8, 3)).parts["stage3_block1"].parts["shortcut"]
    )
    assert (shortcut.params, shortcut.macs, shortcut.gate) == (4 * 8 + 8, 4 * 8 * 16, False)


# --- networks are values -------------------------------------------------------------------------


def test_networks_with_parts_from_outside_are_hashed_and_compared():
    assert tiny(gate=Half) == tiny(gate=Half) != tiny(gate=Scaled)
    assert hash(tiny(gate=Half)) == hash(tiny(gate=Half))
    two, again, three = (tiny(gate=functools.partial(Scaled, units=n)) for n in (2, 2, 3))
    assert two == again != three
    assert hash(two) == hash(again)


@pytest.mark.parametrize("name", ["vgg11", "cifar_densenet40_k12"])
def test_other_families_take_norms(name):
    overrides = {"depth": 13} if "dense" in name else {"num_filters": 4, "fc_units": 8}
    model = create_model(name, norm=nn.LayerNorm, **overrides)
    images = jnp.zeros((1, 32, 32, 3))
    assert any(path.endswith("/scale") for path in shapes(model, images))
    with pytest.raises(UserError, match="norm Smaller makes"):
        shapes(create_model(name, norm=Smaller, **overrides), images)


# --- what makes no network -----------------------------------------------------------------------


class Smaller(nn.Module):
    @nn.compact
    def __call__(self, x, *others):
        return x[:, 1:]


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x, x


class Needs(nn.Module):
    reduction: int

    @nn.compact
    def __call__(self, x):
        return x


def nameless(dtype):
    return Half()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"gate": Smaller}, "gate Smaller makes [2, 7, 8, 4] of [2, 8, 8, 4]; it must give"),
        ({"gate": Pair}, "gate Pair gives a tuple, not an array"),
        ({"norm": Smaller}, "norm Smaller makes [2, 7, 8, 4] of [2, 8, 8, 4]"),
        ({"act": lambda x: x[..., 1:]}, "makes [2, 8, 8, 3] of [2, 8, 8, 4]"),
        ({"shortcut": Half}, "Half makes [2, 8, 8, 4] of [2, 8, 8, 4]; it must give [2, 4, 4, 8]"),
        ({"skip": Smaller}, "skip Smaller must give two arrays"),
        ({"downsample": Half}, "makes [2, 8, 8, 8] of [2, 8, 8, 8]; it must give [2, 4, 4, 8]"),
        ({"stem": Pair}, "stem Pair gives a tuple"),
        ({"gate": Needs}, "field `reduction` without a value; bind it: functools.partial(Needs, "),
        ({"gate": Half()}, "gate is an object of Half: give the class"),
        ({"gate": nameless}, "gate nameless does not take the argument `name`"),
        ({"gate": dict}, "gate dict is no flax.linen module"),
        ({"gate": 3}, "gate 3 must be of type str or Callable or None"),
        ({"gate": "eca"}, "gate 'eca' is not one of 'se'"),
        ({"gate": "se"}, "gate 'se' needs se_reduction"),
        ({"gate": Half, "se_reduction": 4}, "with gate Half it must be 0"),
        ({"shortcut": "Z"}, "shortcut 'Z' is not one of 'A', 'B', 'C'"),
        ({"norm": Half, "zero_init_last": True, "unit": "full_preact"}, "the field `scale_init`"),
        ({"gate": Half, "se_integration": "identity", "shortcut": "none"}, "needs a shortcut"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_one_line(overrides, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        shapes(tiny(**overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("axis", axes.TABLES)
def test_every_row_of_a_table_can_be_built(axis):
    for name in axes.TABLES[axis]:
        more = {"se_reduction": 2} if (axis, name) == ("gate", "se") else {}
        model = tiny(**{"any_size": True, "shortcut": "B", axis: name, **more})
        assert "head/kernel" in shapes(model)


def test_the_settings_that_are_told_are_those_of_the_table():
    """What the docstring says each constructor can ask for is what a network can bind."""
    rows = re.findall(r"^\| (\w+) +\| [\w.]+ +\| (.+?) +\|", constructors.__doc__, re.M)
    documented = {axis: told for axis, told in rows if axis != "axis"}
    assert documented.keys() == axes.TABLES.keys()
    for axis, settings in constructors.SETTINGS.items():
        own = set(settings) - set(constructors.COMMON)
        if axis != "norm":
            text = constructors.__doc__.split(f"| {axis} ")[1]
            assert all(name in text for name in own)
