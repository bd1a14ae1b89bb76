import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import network

from resflax.analysis import taps, units
from resflax.analysis.result import NothingError
from resflax.analysis.subject import untrained
from resflax.models import create_model

pytestmark = pytest.mark.devices(1, 8, long=8)


def counted(model, variables, images, size=6):
    labels = jnp.zeros(len(images), jnp.int32)
    batches = [(images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size)]
    return {u.block: u for u in units.meter(model)(variables, batches)}


def test_every_relu_of_a_residual_net_is_counted_once():
    model, variables, images = network()
    found = counted(model, variables, images)
    assert list(found) == ["stem", "stage2_block1", "stage3_block1", "stage4_block1"]
    # Two a block: inside, and after the sum.
    assert [u.units for u in found.values()] == [4, 8, 16, 32]

    def second(module, method):
        return "inner" if module.path[-1:] == ("conv2",) and "stage4" in module.path[0] else None

    apply = taps.recorded(lambda x: model.apply(variables, x, train=False, features=True), second)
    features, inner = apply(images)
    both = np.asarray(features["stage4"]), np.asarray(inner["inner"].input)
    zeros = np.mean([np.mean(y == 0) for y in both])
    assert found["stage4_block1"].zeros == pytest.approx(zeros, abs=1e-6)


@pytest.mark.long
def test_a_channel_is_dead_where_it_is_zero_everywhere():
    model, variables, images = network()
    scale = variables["params"]["stage3_block1"]["norm1"]
    dead = jnp.arange(8) < 3
    scale["scale"] = jnp.where(dead, 0.0, scale["scale"])
    scale["bias"] = jnp.where(dead, -1.0, 10.0)
    before = counted(*network())
    found = counted(model, variables, images)
    assert found["stage3_block1"].dead == 3 + before["stage3_block1"].dead
    assert found["stage2_block1"] == before["stage2_block1"]
    assert units.verdict([*found.values()]).startswith(f"{sum(u.dead for u in found.values())} of")


@pytest.mark.long
def test_a_unit_that_one_image_wakes_is_alive():
    model, variables, images = network()
    dark = jnp.full_like(images[:1], -100.0)
    kernel = variables["params"]["stem"]["conv"]
    kernel["kernel"] = jnp.abs(kernel["kernel"])
    assert counted(model, variables, dark)["stem"].dead == 4
    assert counted(model, variables, jnp.concatenate([dark, -dark]), size=1)["stem"].dead == 0


@pytest.mark.long
def test_batches_of_any_size_give_the_same():
    model, variables, images = network(se_reduction=2)
    ones, all_at_once = (counted(model, variables, images, size) for size in (4, 6))
    for one, other in zip(ones.values(), all_at_once.values(), strict=True):
        assert one.dead == other.dead
        assert one.zeros == pytest.approx(other.zeros, abs=1e-6)
        assert (one.closed, one.open) == pytest.approx((other.closed, other.open), abs=1e-6)


@pytest.mark.first(1)
@pytest.mark.parametrize("act", ["sigmoid", "tanh"])
def test_sigmoids_saturate(act):
    model, variables, images = network(act=act)
    norm = variables["params"]["stage3_block1"]["norm1"]
    norm["bias"] = jnp.full(8, 20.0)
    found = counted(model, variables, images)
    assert all(u.dead is None and u.zeros is None for u in found.values())
    other = found["stage2_block1"].saturated
    assert found["stage3_block1"].saturated == pytest.approx(0.5, abs=0.1)
    assert other < 0.2


@pytest.mark.long
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_sums_without_an_activation_are_no_units(shortcut):
    # A projection reads what the first convolution reads.
    found = counted(*network(unit="full_preact", shortcut=shortcut))
    # The stem's ReLU is the first of the first block, and the last one's is pooled.
    assert [u.units for u in found.values()] == [4, 4, 4 + 8, 8 + 16 + 16]


@pytest.mark.long
def test_gates_of_both_kinds():
    model, variables, images = network(se_reduction=2)
    excite = variables["params"]["stage2_block1"]["se"]["excite"]
    excite["kernel"] = jnp.zeros_like(excite["kernel"])
    excite["bias"] = jnp.array([-9.0, 9.0, 9.0, 0.0])
    found = counted(model, variables, images)["stage2_block1"]
    assert (found.gates, found.closed, found.open) == (4, 0.25, 0.5)

    model, variables, images = network(skip="shortcut_gating", gate_bias=-20.0)
    found = counted(model, variables, images)
    assert found["stem"].gates == 0
    assert (found["stage3_block1"].gates, found["stage3_block1"].closed) == (8, 1.0)


@pytest.mark.long
def test_a_network_of_maps_in_rows_counts_channels():
    model = create_model("alexnet", num_classes=3, fc_units=8)
    images = jax.random.normal(jax.random.key(1), (2, 96, 96, 3))
    variables = jax.jit(lambda k, x: model.init(k, x, train=False))(jax.random.key(0), images)
    found = counted(model, variables, images)
    assert {name: u.units for name, u in found.items()} == {
        "conv1": 96, "conv2": 256, "conv3": 384, "conv4": 384, "conv5": 256, "fc6": 8, "fc7": 8
    }  # fmt: skip


def test_what_neither_dies_nor_saturates_is_said():
    subject = untrained(
        "cifar_resnet20", {"depth": 8, "act": "silu", "num_filters": 4}, images=4, size=16
    )
    with pytest.raises(NothingError, match="'silu', which neither dies nor saturates"):
        units.run([subject], argparse.Namespace())


@pytest.mark.long
def test_run_has_a_row_a_block_and_no_empty_columns(tmp_path):
    relu, gated = (
        untrained("cifar_resnet20", {"depth": 8, "num_filters": 4, **more}, images=4, size=16)
        for more in ({}, {"se_reduction": 2, "act": "tanh"})
    )
    alone = units.run([relu], argparse.Namespace())
    assert list(alone.rows[0]) == ["network", "block", "units", "dead", "zeros", "gates"]
    both = units.run([relu, gated], argparse.Namespace())
    assert {"saturated", "closed", "open"} <= set(both.rows[0])
    assert len(both.rows) == 8
    assert [p.name for p in both.write(tmp_path)] == ["units.csv", "units.png"]
    assert len(both.figures[""].axes) == 4
    line = both.figures[""].axes[1].lines[0]
    zeros = [row["zeros"] for row in both.rows[:4]]
    np.testing.assert_allclose(line.get_ydata(), np.multiply(zeros, 100))
