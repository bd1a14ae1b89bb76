import pathlib

import pytest

from launch import runs

SMALL = str(pathlib.Path(__file__).parent / "small.py")

SWEEP = """
from resflax.config import base

def get_config(dataset="digits"):
    config = base()
    config.data.source = dataset
    return config

def sweep():
    for depth in (8, 14):
        for lr in (0.1, 0.2):
            yield {"model.depth": depth, "optim.lr": lr}
"""


def write_config(tmp_path, body=SWEEP):
    path = tmp_path / "config.py"
    path.write_text(body)
    return str(path)


def expand(tmp_path, body=SWEEP, **options):
    return runs.expand(write_config(tmp_path, body), tmp_path / "sweep", **options)


def test_runs_are_named_after_what_varies(tmp_path):
    names = [run.name for run in expand(tmp_path)]
    assert names == ["depth=8,lr=0.1", "depth=8,lr=0.2", "depth=14,lr=0.1", "depth=14,lr=0.2"]


def test_a_run_has_its_directory_and_command(tmp_path):
    run = runs.expand(f"{write_config(tmp_path)}:shapes", tmp_path / "sweep")[0]
    assert run.workdir == tmp_path / "sweep/depth=8,lr=0.1"
    assert run.command[1:] == [
        *("-m", "resflax.main", "--config", f"{tmp_path}/config.py:shapes"),
        *("--config.model.depth=8", "--config.optim.lr=0.1", "--workdir", str(run.workdir)),
    ]


def test_the_resolved_config_is_that_of_the_command(tmp_path):
    options = {"seeds": (3,), "overrides": {"data.mean": "(0.5, 0.25, 0.125)"}}
    run = runs.expand(f"{write_config(tmp_path)}:shapes", tmp_path, **options)[0]
    config = run.resolve()
    assert (config.data.source, config.model.depth, config.optim.lr) == ("shapes", 8, 0.1)
    assert (config.seed, config.data.mean) == (3, (0.5, 0.25, 0.125))


def test_directories_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = runs.expand(write_config(tmp_path), pathlib.Path("sweep"))[0]
    assert run.workdir == tmp_path / "sweep/depth=8,lr=0.1"


def test_each_run_is_repeated_with_each_seed(tmp_path):
    found = expand(tmp_path, seeds=(0, 7))
    assert [run.name for run in found[:3]] == [
        *("depth=8,lr=0.1,seed=0", "depth=8,lr=0.1,seed=7", "depth=8,lr=0.2,seed=0")
    ]
    assert len(found) == 8
    assert found[1].overrides["seed"] == 7


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ([("model.depth", "14")], ["depth=14,lr=0.1", "depth=14,lr=0.2"]),
        ([("optim.lr", "1e-1"), ("model.depth", "8")], ["depth=8,lr=0.1"]),
        (
            [("model.depth", "8"), ("model.depth", "14"), ("optim.lr", "0.2")],
            ["depth=8,lr=0.2", "depth=14,lr=0.2"],
        ),
    ],
)
def test_filters_keep_what_has_their_values(tmp_path, filters, kept):
    assert [run.name for run in expand(tmp_path, filters=filters)] == kept


def test_overrides_are_of_all_runs_and_not_in_their_names(tmp_path):
    found = expand(tmp_path, overrides={"train.epochs": "2"})
    assert found[0].name == "depth=8,lr=0.1"
    assert {run.resolve().train.epochs for run in found} == {2.0}


def test_a_slash_makes_no_other_directory(tmp_path):
    body = SWEEP.replace('"optim.lr": lr', '"init_from": f"runs/{lr}"')
    run = expand(tmp_path, body)[0]
    assert run.workdir.parent == tmp_path / "sweep"
    assert run.resolve().init_from == "runs/0.1"


@pytest.mark.parametrize(
    ("body", "options", "right"),
    [
        ("x = 1", {}, r"config\.py has no sweep"),
        ("x = 1 / 0", {}, "ZeroDivisionError: division by zero"),
        (SWEEP, {"filters": [("model.depth", "9")]}, "--filter model.depth=9: the sweep has 8, 14"),
        (SWEEP, {"filters": [("depth", "8")]}, "the sweep varies model.depth, optim.lr"),
        (SWEEP, {"overrides": {"train.epoch": "2"}}, "no field 'epoch'; did you mean epochs"),
        (SWEEP, {"overrides": {"train.epochs": "few"}}, "few"),
        (SWEEP, {"overrides": {"optim.lr": "1"}}, "--override optim.lr: the sweep sets it"),
        (SWEEP.replace("8, 14", "8, 8"), {}, "2 runs named depth=8,lr=0.1"),
        (SWEEP.replace("(8, 14)", "()"), {}, "the sweep is empty"),
        (SWEEP.replace("optim.lr", "seed"), {"seeds": (0,)}, "the sweep sets the seed itself"),
    ],
)
def test_what_cannot_be_is_told(tmp_path, body, options, right):
    with pytest.raises(ValueError, match=right) as error:
        expand(tmp_path, body, **options)
    assert "\n" not in str(error.value).strip()


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*none\.py"):
        runs.expand(f"{tmp_path}/none.py:digits", tmp_path)


def test_a_name_longer_than_that_of_a_file_ends_in_its_digest(tmp_path):
    names = {runs.name_of({"data.folder.path": "é" * 200 + str(i)}) for i in range(2)}
    assert len(names) == 2
    for name in names:
        (tmp_path / name).mkdir()


def test_a_sweep_goes_over_a_field_s_own_none(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from tests.plain import get_config\n"
        "def sweep():\n"
        "    for depth in (None, 14):\n"
        '        yield {"model.depth": depth, "model.se_stages": None}\n'
    )
    depths = [run.resolve().model.get("depth") for run in runs.expand(str(config), tmp_path)]
    assert depths == [None, 14]
