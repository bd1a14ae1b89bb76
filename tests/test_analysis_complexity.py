import argparse
import csv
import dataclasses
import json

import pytest

from resflax import analyze
from resflax.analysis import accuracy, bars, blocks, complexity, gates
from resflax.analysis.subject import untrained
from resflax.models import count, create_model

pytestmark = pytest.mark.devices(1, 8, long=8)

SHAPE = (224, 224, 3)


def table(name, shape=SHAPE, **overrides):
    return complexity.measure(count(create_model(name, **overrides), shape))


def test_the_stages_add_up_to_the_published_network():
    *stages, total = table("resnet50")
    assert [s.stage for s in stages] == ["stem", "stage2", "stage3", "stage4", "stage5", "head"]
    assert [s.blocks for s in stages] == [1, 3, 4, 6, 3, 1]
    assert (total.stage, total.params, total.macs) == ("total", 25_557_032, 4_089_184_256)
    for field in ("blocks", "params", "macs", "activations"):
        assert sum(getattr(s, field) for s in stages) == getattr(total, field)
    assert total.se_params == total.se_macs == 0


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["resnet50", "vgg16_bn", "inception_v3"])
def test_the_share_of_squeeze_excite_is_what_it_adds(name):
    plain, gated = table(name)[-1], table(f"se_{name}")[-1]
    assert gated.se_params * gated.params == pytest.approx(gated.params - plain.params)
    assert gated.se_macs * gated.macs == pytest.approx(gated.macs - plain.macs)
    assert gated.se_params > 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "stages"),
    [
        (
            "densenet121",
            "stem block1 transition1 block2 transition2 block3 transition3 block4 norm head total",
        ),
        ("inception_v3", "stem mixed_5 mixed_6 mixed_7 head total"),
        (
            "inception_resnet_v2",
            "stem mixed_5 block_a reduction_a block_b reduction_b block_c conv_7 head total",
        ),
        ("alexnet", "conv1 conv2 conv3 conv4 conv5 fc6 fc7 head total"),
    ],
)
def test_the_stages_of_other_families(name, stages):
    assert [s.stage for s in table(name)] == stages.split()
    assert gates.stage("block_a10") == "block_a"


@pytest.mark.long
def test_blocks_of_equal_cost_are_those_of_the_papers():
    """He 2015, Figure 5; ResNeXt, Table 2, whose blocks have some 70 thousand weights each."""
    model = create_model("resnet50")
    choices = {c.name: c for c in blocks.measure(model, SHAPE)}
    positions = 56 * 56
    weights = {name: c.block.macs / positions for name, c in choices.items()}
    assert weights == {
        "basic": 2 * 9 * 64 * 64,
        "bottleneck 1 x 64d (its own)": 69_632,
        "bottleneck 2 x 40d": 69_760,
        "bottleneck 4 x 24d": 69_888,
        "bottleneck 8 x 14d": 71_456,
        "bottleneck 32 x 4d": 70_144,
    }
    resnext = count(create_model("resnext50_32x4d"), SHAPE)
    assert choices["bottleneck 32 x 4d"].network == resnext
    assert choices["basic"].network == count(create_model("resnet34"), SHAPE)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("cifar_resnet20", "basic (its own)"),
        ("wide_resnet50_2", "bottleneck 1 x 128d (its own)"),
        ("cifar_resnext29_8x64d", "bottleneck 8 x 64d (its own)"),
    ],
)
def test_a_network_is_among_the_choices_as_it_is(name, own):
    model = create_model(name)
    shape = (32, 32, 3) if name.startswith("cifar") else SHAPE
    choices = {c.name: c for c in blocks.measure(model, shape)}
    assert [n for n in choices if "its own" in n] == [own]
    assert choices[own].network == count(model, shape)


def lazy(name, *, trained=False, label=None):
    """A subject whose variables must not be asked for."""

    def fail():
        raise AssertionError("variables were made")

    one = untrained(name, {}, images=1)
    return dataclasses.replace(one, make_variables=fail, trained=trained, name=label or name)


@pytest.mark.long
def test_runs_are_drawn_by_accuracy_and_keep_their_names_apart(tmp_path):
    paths = [tmp_path / "a" / "seed_0", tmp_path / "b" / "seed_0", tmp_path / "c" / "seed_0"]
    for path, top1 in zip(paths, (0.9, 0.8, None), strict=True):
        path.mkdir(parents=True)
        if top1 is not None:
            (path / "result.json").write_text(
                json.dumps({"eval/top1": top1, "best/top1": top1, "seconds": 1.0})
            )
    names = ["cifar_resnet20", "cifar_resnet32", "cifar_resnet44"]
    runs = [lazy(name, trained=True, label="seed_0 (step 9)") for name in names]
    options = argparse.Namespace(workdir=list(map(str, paths)))
    result = complexity.run([lazy("cifar_plain20"), *runs], options)
    totals = {row["network"]: row for row in result.rows if row["stage"] == "total"}
    assert {name: row["top1"] for name, row in totals.items()} == {
        "cifar_plain20": None,
        "a/seed_0": 0.9,
        "b/seed_0": 0.8,
        "c/seed_0": None,
    }
    assert {row["top1"] for row in result.rows if row["stage"] != "total"} == {None}
    assert set(result.figures) == {"", "accuracy"}
    left, right = result.figures["accuracy"].axes
    points = [line.get_xydata()[0].tolist() for line in left.lines]
    macs = [totals[n]["macs"] / 1e6 for n in ("a/seed_0", "b/seed_0")]
    assert points == [[macs[0], 90.0], [macs[1], 80.0]]
    assert right.lines[0].get_xdata()[0] == pytest.approx(totals["a/seed_0"]["params"] / 1e3)


def test_a_damaged_result_is_named(tmp_path):
    assert accuracy.read(tmp_path) is None
    for text in ("{", "{}", "[]"):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(ValueError, match=r"result.json (cannot be read|has no|is not)"):
            accuracy.read(tmp_path)


def test_no_accuracy_is_drawn_above_all():
    points = [accuracy.Point("all", 10, 10, 1.0), accuracy.Point("none", 90, 90, 0.5)]
    axes = accuracy.draw(points).axes[0]
    assert 100 < axes.get_ylim()[1] < 103
    assert axes.get_xscale() == "log"


def test_bars_are_stacked_in_units_that_are_readable():
    costs = {"stem": (2_000_000, 500), "head": (1_000_000, 250)}
    figure = bars.draw([("one", costs), ("two", {"stem": (4_000_000, 0)})])
    left, right = figure.axes
    pieces = [(p.get_x(), p.get_width(), round(p.get_y() + 0.35)) for p in left.patches]
    assert pieces == [(0.0, 2.0, 0), (2.0, 1.0, 0), (0.0, 4.0, 1)]
    assert left.get_xlabel().endswith(", millions")
    assert right.get_xlabel() == "parameters"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["stem", "head"]


def test_names_of_many_stages_stand_in_the_bars_that_have_room():
    costs = {f"stage{i}": (10**6 * (i % 5 == 0) + 1, 1) for i in range(14)}
    figure = bars.draw([("one", costs)])
    assert not figure.legends
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["stage0", "stage5", "stage10"]


@pytest.mark.long
def test_the_command_counts_and_compares(tmp_path, capsys):
    command = ["complexity", "--model", "cifar_se_resnet110", "--out", str(tmp_path)]
    assert analyze.main(command) == 0
    assert "gates have" in " ".join(capsys.readouterr().out.split())
    names = ["complexity.csv", "complexity.png", "complexity_blocks.csv", "complexity_blocks.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    rows = list(csv.DictReader((tmp_path / "complexity.csv").read_text().splitlines()))
    assert [row["stage"] for row in rows][-1] == "total"
    assert "top1" not in rows[0]
    kinds = list(csv.DictReader((tmp_path / "complexity_blocks.csv").read_text().splitlines()))
    assert len({row["network"] for row in kinds}) == 6
    own = [row for row in kinds if row["network"] == "basic (its own)"]
    assert own[0]["stage"] == "stage2_block2"
    for row, other in zip(own[1:], rows, strict=True):
        assert row == {**other, "network": "basic (its own)"}
