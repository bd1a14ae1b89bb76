import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import network

from resflax.analysis import responses
from resflax.analysis.subject import untrained

pytestmark = pytest.mark.devices(1, 8, long=8)


def measured(model, variables, *batches):
    return responses.measure(model, variables, [(b, jnp.zeros(len(b), int)) for b in batches])


@pytest.mark.long
def test_the_first_response_is_that_of_the_stem():
    model, variables, images = network()
    found = measured(model, variables, images)
    kernel = variables["params"]["stem"]["conv"]["kernel"]
    y = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert found[0].layer == "stem/norm"
    # Running statistics of 0 and 1, and an epsilon.
    assert found[0].std == pytest.approx(float(np.std(y)), rel=1e-4)
    assert found[0].mean == pytest.approx(float(np.mean(y)), abs=1e-5)


@pytest.mark.long
def test_layers_are_in_order_and_the_scale_of_a_norm_scales_its_response():
    model, variables, images = network()
    before = {r.layer: r for r in measured(model, variables, images)}
    names = [f"stage{s}_block1/norm{i}" for s in (2, 3, 4) for i in (1, 2)]
    assert list(before) == ["stem/norm", *names]
    norm = variables["params"]["stage4_block1"]["norm2"]
    norm["scale"] = norm["scale"] * 3
    after = {r.layer: r for r in measured(model, variables, images)}
    ratios = {name: after[name].std / before[name].std for name in after}
    assert ratios.pop("stage4_block1/norm2") == pytest.approx(3, rel=1e-5)
    assert set(ratios.values()) == {1.0}


@pytest.mark.long
def test_batches_of_any_size_give_the_same():
    model, variables, images = network()
    # Of other means, which count towards the deviation of all.
    images = images.at[4:].add(5.0)
    together = measured(model, variables, images)
    apart = measured(model, variables, images[:4], images[4:])
    for one, other in zip(together, apart, strict=True):
        assert (one.mean, one.std) == pytest.approx((other.mean, other.std), rel=1e-4, abs=1e-6)


@pytest.mark.long
def test_without_norms_convolutions_respond():
    found = measured(*network(norm="none"))
    assert [r.layer for r in found][:3] == [
        "stem/conv",
        "stage2_block1/conv1",
        "stage2_block1/conv2",
    ]
    assert len(found) == 7
    assert "convolution (no norms)" in responses.verdict(found)
    assert "convolution" not in responses.verdict(measured(*network()))


@pytest.mark.long
def test_projections_are_rows_and_not_drawn():
    found = measured(*network(shortcut="B"))
    assert sum(r.projection for r in found) == 2
    by_layer, by_size = responses.draw({"net": found}).axes
    values = [r.std for r in found if not r.projection]
    np.testing.assert_array_equal(by_layer.lines[0].get_ydata(), values)
    np.testing.assert_array_equal(by_size.lines[0].get_ydata(), sorted(values, reverse=True))


@pytest.mark.long
def test_run(tmp_path):
    subjects = [
        untrained("cifar_resnet20", {"depth": 8, "num_filters": 4, "norm": norm}, images=4, size=16)
        for norm in ("group", "none")
    ]
    result = responses.run(subjects, argparse.Namespace())
    assert len(result.rows) == 14
    assert len(result.remarks) == 2
    assert "not trained" in result.remarks[0]
    assert [p.name for p in result.write(tmp_path)] == ["responses.csv", "responses.png"]
