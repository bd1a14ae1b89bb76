"""Checkpoints under another step's number, and of other runs: whose they are is compared."""

import contextlib
import hashlib
import json
import shutil

import pytest
from plain import config as plain_config
from test_checkpoint import at, create, parallel_of, reopen
from test_workdir import DESCRIPTION

import resflax
from resflax import config as config_lib
from resflax import train
from resflax.checkpoint import Checkpointer, CheckpointError, facts, of_run, origin, store
from resflax.checkpoint.__main__ import main
from resflax.checkpoint.manifest import Manifest
from resflax.run import workdir as workdir_lib


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train.train_and_evaluate(plain_config(**{"train.epochs": 1.0}), workdir)
    return workdir


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


def edit(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def forget(checkpoint, **changes):
    """Makes the manifest what the first version wrote."""
    manifest = Manifest.read(checkpoint)
    for name in ("config", "data"):
        manifest.facts.pop(name)
    manifest.facts.update(changes)
    manifest.write(checkpoint)


def save(workdir, steps, config=None, description=DESCRIPTION, **counts):
    """The states of some steps of a run."""
    parallel = parallel_of("jit", 1)
    state = create(parallel, seed=0)
    own = facts("{}") | of_run(config or plain_config(), description, **counts)
    with contextlib.closing(Checkpointer(workdir, keep=9, facts=own)) as saver:
        for step in steps:
            saver.save(at(state, step), {"top1": 0.5})


def open_with(workdir, config=None, description=DESCRIPTION, **counts):
    """What a run is told that finds these checkpoints."""
    said = []
    own = facts("{}") | of_run(config or plain_config(), description, **counts)
    Checkpointer(workdir, keep=9, facts=own, report=said.append).close()
    return said


def test_a_step_under_another_number_is_set_aside(tmp_path, capsys):
    save(tmp_path, [1, 2])
    (tmp_path / "checkpoints/2").rename(tmp_path / "checkpoints/40")
    assert main(["verify", str(tmp_path)]) == 1
    assert "checkpoints/40: NOT THIS RUN'S: its directory holds the state of step 2." in (
        capsys.readouterr().out
    )
    state, (said,) = reopen(tmp_path)
    assert int(state.step) == 1
    assert said == (
        "the checkpoint of step 40 is not this run's: its directory holds the state of step 2. It "
        f"was moved to {tmp_path / 'damaged_checkpoints/40'}; the run has step 1."
    )
    assert store.steps(tmp_path) == [1, 2]  # the next one was saved


def test_a_state_that_orbax_leaves_out_is_no_silent_loss(tmp_path):
    parallel = parallel_of("jit", 1)
    saver = Checkpointer(tmp_path, keep=9)
    saver.save(at(create(parallel, seed=0), 4), {"top1": 0.5})
    saver.save(at(create(parallel, seed=0), 3), {"top1": 0.5})
    with pytest.raises(ValueError, match="step 3 could not be saved: there is a later one, of ste"):
        saver.close()


@pytest.mark.parametrize(
    ("other", "right"),
    [
        ({"config": {"model.act": "silu"}}, "model.act: 'silu' -> None"),
        ({"config": {"seed": 7}}, "seed: 7 -> 0"),
        ({"num_train": 7}, "data num_train: 7 -> 64"),
    ],
)
def test_a_checkpoint_of_another_run_is_set_aside(tmp_path, other, right):
    counts = {"num_train": other.get("num_train", 64)}
    save(tmp_path / "other", [9], plain_config(**other.get("config", {})), **counts)
    save(tmp_path / "run", [1], num_train=64)
    shutil.copytree(tmp_path / "other/checkpoints/9", tmp_path / "run/checkpoints/9")
    (said,) = open_with(tmp_path / "run", num_train=64)
    assert f"step 9 is not this run's: its config or data were others ({right})" in said
    assert store.steps(tmp_path / "run") == [1]


def test_what_may_differ_is_gone_on_from(tmp_path):
    save(tmp_path, [1])
    values = {"train.epochs": 9.0, "data.threads": 3, "data.folder.path": "/new/"}
    assert values.keys() <= config_lib.MAY_DIFFER.keys()
    assert open_with(tmp_path, plain_config(**values)) == []


def test_the_fields_that_may_differ_are_fields():
    assert config_lib.MAY_DIFFER.keys() <= config_lib.flatten(config_lib.base()).keys()


@pytest.mark.parametrize(("field", "value"), [("act", "silu"), ("bn_epsilon", 0.5)])
def test_a_config_that_was_edited_by_hand_evaluates_nothing(run, field, value):
    edit(run / "config.json", lambda config: config["model"].update({field: value}))
    right = rf"step 2 is not this run's: its config or data were others \(model\.{field}: None -> "
    for choice in ({}, {"step": 2}, {"best": True}):
        with pytest.raises(CheckpointError, match=right):
            resflax.restore(run, **choice)
    config = workdir_lib.read_config(run)
    with pytest.raises(CheckpointError, match=right):
        train.train_and_evaluate(config, run)
    assert store.steps(run) == [2]


def test_a_description_of_other_data_restores_nothing(run):
    edit(run / "dataset.json", lambda dataset: dataset["label_names"].reverse())
    with pytest.raises(CheckpointError, match=r"data label_names\[0\]: "):
        resflax.restore(run)


def test_data_that_are_decoded_a_little_otherwise_are_the_same(run):
    edit(run / "dataset.json", lambda d: d.update(mean=[m + 1e-5 for m in d["mean"]]))
    assert resflax.restore(run).step == 2


def test_checkpoints_of_the_first_version_restore_and_say_what_they_cannot_tell(run, recwarn):
    checkpoint = run / "checkpoints/2"
    forget(checkpoint)
    assert resflax.restore(run).step == 2
    text = (run / "config.json").read_text()
    # A field that came later: the digest is of the file as it was written.
    fields = json.loads(text)
    del fields["analysis"]
    (run / "config.json").write_text(json.dumps(fields))
    digest = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    manifest = Manifest.read(checkpoint)
    manifest.facts["config_sha256"] = digest
    manifest.write(checkpoint)
    assert resflax.restore(run).step == 2
    assert not [w for w in recwarn if "another config" in str(w.message)]
    (run / "config.json").write_text(text.replace('"depth"', '"bn_epsilon": 0.5, "depth"'))
    with pytest.warns(UserWarning, match="step 2 was saved with another config than "):
        assert resflax.restore(run).step == 2
    assert "another config than" in origin.doubt(manifest, run)


def test_a_run_goes_on_with_other_data_only_in_another_directory(run):
    forget(run / "checkpoints/2")
    edit(run / "dataset.json", lambda dataset: dataset["label_names"].reverse())
    before = (run / "dataset.json").read_text()
    with pytest.raises(workdir_lib.WorkdirError, match="a run with other data "):
        train.train_and_evaluate(plain_config(**{"train.epochs": 1.0}), run)
    assert (run / "dataset.json").read_text() == before


@pytest.mark.long
def test_a_finished_run_is_made_longer_and_not_shorter(run):
    with pytest.raises(ValueError, match=r"0\.5 ends after step 1, and the run in .* step 2 "):
        train.train_and_evaluate(plain_config(**{"train.epochs": 0.5}), run)
    assert workdir_lib.read_config(run).train.epochs == 1.0
    assert (run / "result.json").exists()
    train.train_and_evaluate(plain_config(**{"train.epochs": 2.0}), run)
    assert resflax.restore(run).step == 4
    assert workdir_lib.read_config(run).train.epochs == 2.0


def test_a_result_for_another_number_of_epochs_goes(tmp_path):
    workdir_lib.open_run(tmp_path, plain_config())
    workdir_lib.write_result(tmp_path, {})
    workdir_lib.renew_config(tmp_path, plain_config(**{"log.every_steps": 3}))
    assert workdir_lib.read_config(tmp_path).log.every_steps == 3
    assert (tmp_path / "result.json").exists()
    workdir_lib.renew_config(tmp_path, plain_config(**{"train.epochs": 3.0}))
    assert not (tmp_path / "result.json").exists()
