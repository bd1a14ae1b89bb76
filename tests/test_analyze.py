"""Tests of the command line of the analyses."""

import csv

import pytest

from resflax import analyze

SMALL = ("--size", "16", "--images", "4", "--set", "depth=8", "--set", "num_filters=4")


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        analyze.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


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
        (("signal", "--model", "resnet-50"), "no network 'resnet-50'"),
        (("signal", "--model", "cifar_resnet20", "--set", "depth"), "must be ARGUMENT=VALUE"),
        (("signal", "--model", "cifar_resnet20", "--set", "dept=8"), "no argument 'dept'"),
        (("signal", "--model", "cifar_resnet20", "--images", "-1"), "must be at least 1"),
        (("lesion", "--model", "vgg11", "--size", "64"), "residual blocks"),
        (("landscape", "--model", "cifar_resnet20", "--grid", "4"), "must be odd"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(arguments, said, capsys, tmp_path):
    assert said in failure(capsys, *arguments, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_directory_without_a_run(tmp_path, capsys):
    assert "holds no run" in failure(capsys, "units", "--workdir", str(tmp_path))
