"""Tests of the command line of the analyses."""

import csv
import itertools
import json

import numpy as np
import pytest
from PIL import Image
from plain import config as plain_config

from resflax import analyze
from resflax.analysis import lesions
from resflax.train import train_and_evaluate

VGG = ("--set", "num_filters=2", "--set", "fc_units=8")
SMALL = ("--size", "16", "--images", "4", "--set", "depth=8", "--set", "num_filters=4")


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        analyze.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.long
def test_every_combination_of_values_is_a_network(tmp_path, capsys):
    arguments = ("signal", "--model", "cifar_resnet20", *SMALL, "--batch", "4")
    assert analyze.main([*arguments, "--set", "shortcut=A,none", "--out", str(tmp_path)]) == 0
    with (tmp_path / "signal.csv").open() as file:
        names = [row["network"] for row in csv.DictReader(file)]
    assert set(names) == {
        f"cifar_resnet20 depth=8, num_filters=4, shortcut={s}" for s in ("A", "none")
    }
    assert (tmp_path / "signal.png").read_bytes().startswith(b"\x89PNG")
    said = " ".join(capsys.readouterr().out.split())
    assert "gradient" in said
    assert "signal.csv, signal.png" in said


@pytest.mark.long
def test_networks_of_one_name_are_told_apart(tmp_path):
    arguments = ("signal", *("--model", "cifar_resnet20") * 2, *SMALL, "--batch", "4")
    analyze.main([*arguments, "--out", str(tmp_path)])
    with (tmp_path / "signal.csv").open() as file:
        names = {row["network"] for row in csv.DictReader(file)}
    assert {name[-4:] for name in names} == {" (1)", " (2)"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("signal",), "--model NAME or --workdir DIR is required"),
        (("signal", "--model", "cifar_resnet20", "--batch", "0"), "0 must be at least 1"),
        (("signal", "--model", "resnet-50"), "no network 'resnet-50'"),
        (
            ("signal", "--model", "cifar_resnet20", "--set", "depth"),
            "argument --set: 'depth' must be NAME=VALUE",
        ),
        (("signal", "--model", "cifar_resnet20", "--set", "dept=8"), "no argument 'dept'"),
        (("signal", "--model", "cifar_resnet20", "--images", "-1"), "must be at least 1"),
        (("signal", "--model", "cifar_resnet20", "--images", "0"), "must be at least 1"),
        # Small: else the test after this one waits for the weights, which are drawn meanwhile.
        (
            ("lesion", "--model", "vgg11", "--size", "32", *VGG),
            "vgg11 num_filters=2, fc_units=8 has no residual blocks",
        ),
        (
            ("signal", "--model", "cifar_resnet20", "--data", "sauce=digits"),
            "has no field 'sauce'; it has",
        ),
        (("signal", "--model", "cifar_resnet20", "--data", "source=x"), "'x' is not one of"),
        (
            ("signal", "--model", "cifar_resnet20", "--data", "threads=a"),
            "threads 'a' must be of type int",
        ),
        (("landscape", "--model", "cifar_resnet20", "--grid", "4"), "must be odd"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(arguments, said, capsys, tmp_path):
    assert said in failure(capsys, *arguments, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_other_images(tmp_path):
    data = ("--data", "source=digits", "--data", "image_size=16")
    one = analyze.subject.untrained(
        "cifar_resnet20",
        {"depth": 8, "num_filters": 4},
        images=40,
        data={"source": "digits", "image_size": 16},
    )
    assert one.images.shape == (40, 16, 16, 1)
    assert len(set(one.labels)) > 5
    assert one.description.label_names == tuple("0123456789")
    arguments = ("signal", "--model", "cifar_resnet20", "--set", "depth=8", "--images", "4", *data)
    arguments = (*arguments, "--set", "num_filters=4")
    assert analyze.main([*arguments, "--out", str(tmp_path)]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "small"
    train_and_evaluate(plain_config(**{"train.epochs": 1.0, "model.se_reduction": 4}), workdir)
    return workdir


@pytest.mark.long
def test_a_run_with_other_images_of_its_kind(run):
    whole = analyze.subject.from_run(run, images=50)
    other = analyze.subject.from_run(run, images=50, data={"shapes.seed": 1})
    assert (whole.images != other.images).any()
    # As the network was trained.
    assert other.description.mean == whole.description.mean
    larger = analyze.subject.from_run(run, images=4, data={"image_size": 24})
    assert larger.image_shape == (24, 24, 3)


@pytest.mark.long
def test_a_run_with_images_of_other_channels_or_classes(run, tmp_path, capsys):
    digits = ("--data", "source=digits")
    said = failure(capsys, "lesion", "--workdir", str(run), *digits)
    assert "images of 'digits' and those that the network in" in said
    assert "differ in the number of channels: 1 and 3" in said
    path = tmp_path / "set.npz"
    images, labels = np.zeros((6, 16, 16, 3), np.uint8), np.arange(6) % 3
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    arrays = ("--data", "source=arrays", "--data", f"arrays.path={path}")
    source = {"source": "arrays", "arrays.path": str(path)}
    one = analyze.subject.untrained("cifar_resnet20", {}, images=4, data=source)
    assert one.model.num_classes == 3
    assert "number of classes: 3 and 10" in failure(
        capsys, "lesion", "--workdir", str(run), *arrays
    )


@pytest.mark.long
def test_of_ten_crops_the_middle_one_is_looked_at(tmp_path):
    rng = np.random.default_rng(0)
    for split, label, i in itertools.product(("train", "val"), "ab", range(4)):
        path = tmp_path / "images" / split / label / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(path)
    data = {"source": "folder", "folder.path": str(tmp_path / "images"), "eval_resize": 24}
    overrides = {f"data.{k}": v for k, v in data.items()} | {"data.test_crops": 10}
    overrides |= {"train.batch_size": 8, "train.epochs": 1.0, "eval.batch_size": 8}
    train_and_evaluate(plain_config(**overrides), tmp_path / "run")
    one = analyze.subject.from_run(tmp_path / "run", images=4)
    assert one.images.shape == (4, 16, 16, 3)
    whole = np.asarray(Image.open(tmp_path / "images" / "val" / "a" / "0.png"))
    np.testing.assert_array_equal(one.images[0], whole[4:20, 4:20])
    # Drawn from all of them, which are sorted by class.
    assert one.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.long
def test_a_lesion_of_nothing_is_the_evaluation_of_a_run(run):
    one = analyze.subject.from_run(run, images=50)
    found = lesions.measure(one.model, one.variables, list(one.batches(32)), draws=1)
    result = json.loads((run / "result.json").read_text())
    assert found[0].top1 == pytest.approx(result["eval/top1"])


@pytest.mark.long
def test_statistics_of_many_large_images_are_of_some(monkeypatch):
    seen = []
    monkeypatch.setattr(analyze.subject, "_initialised", lambda model, x, seed: seen.append(x))
    for size, images in ((16, 40), (224, 33)):
        one = analyze.subject.untrained("cifar_resnet20", {}, images=images, size=size)
        assert one.variables is None
    assert [x.shape for x in seen] == [(40, 16, 16, 3), (32, 224, 224, 3)]


def test_a_directory_without_a_run(tmp_path, capsys):
    assert "holds no run" in failure(capsys, "units", "--workdir", str(tmp_path))
