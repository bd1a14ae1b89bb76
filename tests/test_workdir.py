"""Tests of a run's directory: whose it becomes, and what its files keep."""

import hashlib
import json
import os
import re
import resource

import pytest
from small import config as small_config

from resflax import config as config_lib
from resflax.data.sources import Description
from resflax.run import workdir as workdir_lib

DESCRIPTION = Description("pets", (16, 24, 3), ("cat", "dog"), (0.5, 0.25, 0.125), (0.1, 0.2, 0.3))


def contents(directory):
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_file()
    }


def open_error(workdir, config):
    with pytest.raises(workdir_lib.WorkdirError) as error:
        workdir_lib.open_run(workdir, config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_new_directory_is_made_and_holds_the_config_alone(tmp_path):
    config = small_config(**{"optim.step_epochs": (1, 2)})
    workdir = tmp_path / "sweep" / "run"
    workdir_lib.open_run(workdir, config)
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    assert workdir_lib.read_config(workdir) == config


def test_a_directory_of_the_same_config_is_resumed_as_it_stands(tmp_path):
    workdir_lib.open_run(tmp_path, small_config())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.5}\n')
    (tmp_path / "checkpoints").mkdir()
    before = contents(tmp_path)
    workdir_lib.open_run(tmp_path, small_config())
    assert contents(tmp_path) == before


def test_a_directory_of_another_config_is_refused_with_all_that_differs(tmp_path):
    workdir_lib.open_run(tmp_path, small_config())
    before = contents(tmp_path)
    other = small_config(**{"model.depth": 14, "optim.lr": 0.3})
    assert open_error(tmp_path, other) == (
        f"workdir {tmp_path} holds a run with another config (model.depth: 11 -> 14; "
        "optim.lr: 0.1 -> 0.3); take another --workdir, or the config that it was started with."
    )
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "dataset.json"])
def test_files_of_a_run_without_its_config_are_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    assert f"{tmp_path} has {name} but no config.json" in open_error(tmp_path, small_config())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_that_are_of_no_run_do_not_matter(tmp_path):
    (tmp_path / "log.txt").write_text("of a launcher\n")
    workdir_lib.open_run(tmp_path, small_config())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "log.txt"]
    assert (tmp_path / "log.txt").read_text() == "of a launcher\n"


def test_where_there_can_be_no_directory_it_is_said(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert f"{file} is a file" in open_error(file, small_config())
    assert open_error(file / "run", small_config()) == (
        f"workdir {file}/run cannot be made: Not a directory."
    )
    assert file.read_text() == "mine"


def test_a_config_that_is_none_is_refused_with_its_file(tmp_path):
    (tmp_path / "config.json").write_text('{"modle": {"depth": 8}}')
    assert f"{tmp_path}/config.json: not a config" in open_error(tmp_path, small_config())
    assert (tmp_path / "config.json").read_text() == '{"modle": {"depth": 8}}'
    (tmp_path / "config.json").write_text('{"model": {"depht": 8}}')
    assert "model.depht: 8 -> None" in open_error(tmp_path, small_config())


@pytest.mark.parametrize("data", [b"", b"\0" * 512])
def test_an_empty_config_alone_is_written_anew(tmp_path, data):
    (tmp_path / "config.json").write_bytes(data)
    workdir_lib.open_run(tmp_path, small_config())
    assert workdir_lib.read_config(tmp_path) == small_config()


@pytest.mark.parametrize("data", [None, b"", b"\0" * 512, b'{"model": {"na', b"\xff\xfe"])
def test_a_lost_config_is_written_anew_where_the_checkpoints_are_of_it(tmp_path, data):
    if data is not None:
        (tmp_path / "config.json").write_bytes(data)
    (tmp_path / "checkpoints").mkdir()
    text = config_lib.to_json(small_config())
    for known in ((), {hashlib.sha256(b"of another one").hexdigest()}):
        with pytest.raises(workdir_lib.WorkdirError, match=re.escape(f"{tmp_path}")) as error:
            workdir_lib.open_run(tmp_path, small_config(), known)
        assert "config.json" in str(error.value)
        assert "\n" not in str(error.value)
    workdir_lib.open_run(tmp_path, small_config(), {hashlib.sha256(text.encode()).hexdigest()})
    assert (tmp_path / "config.json").read_text() == text


def test_a_config_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"seed": "\xff"}')
    with pytest.raises(workdir_lib.WorkdirError) as error:
        workdir_lib.read_config(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json: not a config of resflax: 'utf-8'")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 99,
        b'{"eval',
        b"[]",
        b"\xff",
        b'{"a": "x"}',
        b'{"eval/top1": 2, "best/top1": 1, "seconds": 1}',
        b"[" * 9999,
    ],
)
def test_a_result_that_is_none_is_an_error(tmp_path, data):
    assert workdir_lib.read_result(tmp_path) is None
    (tmp_path / "result.json").write_bytes(data)
    with pytest.raises(
        workdir_lib.WorkdirError, match=r"^result.json( cannot be read| is not|: eval| has)"
    ):
        workdir_lib.read_result(tmp_path)
    result = {"eval/top1": 0.5, "best/top1": 0.75, "seconds": 1.0, "eval/loss": float("inf")}
    workdir_lib.write_result(tmp_path, result)
    assert workdir_lib.read_result(tmp_path) == result


def test_a_file_is_written_anew_and_nothing_stays_beside_it(tmp_path):
    path = tmp_path / "note.txt"
    for text in ("first", "second"):
        workdir_lib.write_atomically(path, text)
        assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [
            ("note.txt", text)
        ]


def test_whoever_reads_while_a_file_is_written_has_the_old_one_whole(tmp_path):
    path = tmp_path / "note.txt"
    workdir_lib.write_atomically(path, "first")
    with path.open() as reader:
        workdir_lib.write_atomically(path, "second")
        assert reader.read() == "first"
    assert path.read_text() == "second"


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path):
    path = tmp_path / "note.txt"
    workdir_lib.write_atomically(path, "first")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # as a disk that gets full
    try:
        with pytest.raises(workdir_lib.WorkdirError) as error:
            workdir_lib.write_atomically(path, "x" * 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == f"{path} cannot be written: File too large."
    assert path.read_text() == "first"


def test_a_file_in_a_directory_that_is_gone_is_said(tmp_path):
    with pytest.raises(workdir_lib.WorkdirError, match=r"note\.txt cannot be written: No such"):
        workdir_lib.write_atomically(tmp_path / "gone" / "note.txt", "text")
    assert os.listdir(tmp_path) == []


def test_a_result_is_kept_to_the_last_digit(tmp_path):
    result = {"eval/top1": 1 / 3, "best/top1": 0.1 + 0.2, "seconds": 12.0}
    workdir_lib.write_result(tmp_path, result)
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text) == result
    assert text.endswith("}\n")


def test_no_bad_files_are_not_noted(tmp_path):
    workdir_lib.write_bad_files(tmp_path, iter(()))
    assert os.listdir(tmp_path) == []


def test_bad_files_are_noted_once_beside_those_of_an_earlier_start(tmp_path):
    workdir_lib.write_bad_files(tmp_path, iter(["b: cut off", "a: empty"]))
    workdir_lib.write_bad_files(tmp_path, iter(["a: empty", "c: no image"]))
    noted = (tmp_path / "bad_files.txt").read_text()
    assert noted == "b: cut off\na: empty\nc: no image\n"


def test_a_description_is_read_as_it_was_written(tmp_path):
    workdir_lib.write_description(tmp_path, DESCRIPTION)
    found = workdir_lib.read_description(tmp_path)
    assert found == DESCRIPTION
    hash(found)  # its lists are tuples again


@pytest.mark.parametrize(
    "text",
    [None, '{"name"', "[]", "3", '{"name": "pets"}', '{"colour": "red"}'],
)
def test_a_description_that_cannot_be_read_is_said_with_its_file(tmp_path, text):
    if text is not None:
        (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(workdir_lib.WorkdirError) as error:
        workdir_lib.read_description(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/dataset.json cannot be read: ")


def test_a_config_is_read_with_the_fields_that_came_later(tmp_path):
    fields = json.loads(config_lib.to_json(small_config()))
    del fields["analysis"], fields["checkpoint"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert workdir_lib.read_config(tmp_path) == small_config()


def test_data_differ_by_their_first_difference():
    data = {"label_names": ["cat", "dog"], "mean": (0.5, 0.25), "num_train": 64}
    assert workdir_lib.data_difference(data, data | {"mean": [0.5, 0.2501], "std": 1}) == []
    other = {"label_names": ("cat", "dog", "eel"), "mean": [0.5, "x"], "num_train": 65}
    assert workdir_lib.data_difference(data, other) == [
        "data label_names[2]: None -> 'eel'",
        "data mean[1]: 0.25 -> 'x'",
        "data num_train: 64 -> 65",
    ]


def test_a_directory_with_other_values_of_free_fields_is_resumed(tmp_path):
    workdir_lib.open_run(tmp_path, small_config())
    free = {"train.epochs": 9.0, "data.threads": 3, "log.every_steps": 7, "checkpoint.keep": 1}
    workdir_lib.open_run(tmp_path, small_config(**free))
    assert workdir_lib.read_config(tmp_path) == small_config()


@pytest.mark.parametrize(
    ("field", "value"),
    [("image_shape", [16, "x", 3]), ("mean", [0.5, None, 0.5]), ("std", [0.0, 1, 1]), ("name", 3)],
)
def test_a_description_of_no_data_set_is_refused(tmp_path, field, value):
    good = Description("shapes", (16, 16, 3), ("a", "b"), (0, 0.5, 0.5), (1, 0.5, 0.5))
    workdir_lib.write_description(tmp_path, good)
    assert workdir_lib.read_description(tmp_path) == good
    fields = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(workdir_lib.WorkdirError, match=rf"dataset\.json cannot be read: {field}"):
        workdir_lib.read_description(tmp_path)
