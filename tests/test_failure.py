"""Numbers that are not finite: skipped, counted, recorded and replayed."""

import json

import jax
import numpy as np
import pytest
from plain import config as plain_config

import resflax
from resflax import checkpoint, evaluate, train
from resflax.checkpoint import store
from resflax.errors import UserError
from resflax.run import failure, progress, replay

# An update of this rate makes the next loss infinite or NaN.
DIVERGING = {"optim.lr": 1e20, "optim.momentum": 0.0, "train.epochs": 4.0}


# One step an epoch. After the first epoch the rate makes the parameters themselves infinite, by a
# step whose own loss and gradient are finite.
OVERFLOWING = {
    "train.batch_size": 64,
    "train.epochs": 2.0,
    "optim.schedule": "step",
    "optim.step_epochs": (1,),
    "optim.step_factor": 3e38,
    "optim.lr": 0.01,
    "optim.momentum": 0.0,
    "optim.weight_decay": 1e4,
}


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """The directory of a run that diverged, and what it said."""
    workdir = tmp_path_factory.mktemp("failed") / "run"
    with pytest.raises(progress.NonFiniteError) as error:
        train.train_and_evaluate(plain_config(**DIVERGING), workdir)
    return workdir, str(error.value)


def test_the_step_is_recorded(failed):
    workdir, said = failed
    record = failure.Failure.read(workdir)
    assert f"of step {record.step} " in said
    assert "config.train.max_skips is 0" in said
    assert f"{workdir / 'failure.json'} tells of the step, and --replay repeats it" in said
    assert len(set(record.indices)) == 32
    assert max(record.indices) < 64
    assert "head/kernel" in record.layer_norms
    assert not np.isfinite([record.loss, record.grad_norm]).all()


def test_the_recorded_key_is_what_the_step_drew_from(failed):
    workdir, _ = failed
    record = failure.Failure.read(workdir)
    # As steps.py has it: a state knows the steps that were taken before.
    key = jax.random.fold_in(jax.random.key(plain_config().seed), record.step - 1)
    assert record.key == jax.random.key_data(key).tolist()


def test_nothing_is_spoilt(failed):
    for path in (failed[0] / "checkpoints").glob("[0-9]*"):
        variables = resflax.restore(failed[0], step=int(path.name)).variables
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


@pytest.mark.long
def test_a_replay_gives_the_same(failed, capsys):
    workdir, _ = failed
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert replay.replay(plain_config(**DIVERGING), workdir)
    output = capsys.readouterr().out
    assert "head/kernel" in output
    assert ": as in " in output
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    # Of other numbers it says so.
    record = json.loads((workdir / "failure.json").read_text())
    text = json.dumps(record | {"grad_norm": 1.0})
    (workdir / "failure.json").write_text(text)
    assert not replay.replay(plain_config(**DIVERGING), workdir)
    (workdir / "failure.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def overflown(tmp_path_factory):
    """The directory of a run whose parameters overflowed at the end of an epoch; what it said."""
    workdir = tmp_path_factory.mktemp("overflown") / "run"
    with pytest.raises(progress.NonFiniteError) as error:
        train.train_and_evaluate(plain_config(**OVERFLOWING), workdir)
    return workdir, str(error.value)


def test_a_state_whose_parameters_overflowed_is_neither_evaluated_nor_saved(overflown):
    workdir, said = overflown
    assert "is not finite after step 2 (epoch 2.00)" in said
    assert f"{workdir / 'failure.json'} tells of the step" in said
    assert store.steps(workdir) == [1]
    assert resflax.restore(workdir, best=True).step == 1
    assert not (workdir / "result.json").exists()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/top1" in line] == [1]
    record = failure.Failure.read(workdir)
    assert record.array.startswith("variables/params/")
    assert record.array in said
    assert np.isfinite([record.loss, record.grad_norm]).all()


@pytest.mark.long
def test_a_run_whose_parameters_overflowed_goes_on_from_before_and_is_replayed(overflown, capsys):
    workdir, said = overflown
    with pytest.raises(progress.NonFiniteError) as error:
        train.train_and_evaluate(plain_config(**OVERFLOWING), workdir)
    assert str(error.value) == said
    assert "resumed after step 1 of 2" in capsys.readouterr().out
    assert store.steps(workdir) == [1]
    assert replay.replay(plain_config(**OVERFLOWING), workdir)
    assert "is not finite after step 2" in capsys.readouterr().out


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """The directory of a finished run whose last state was saved without a look at it."""
    workdir = tmp_path_factory.mktemp("spoilt") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "spoilt", lambda state: None)
        train.train_and_evaluate(plain_config(**OVERFLOWING), workdir)
    return workdir


@pytest.mark.long
def test_what_is_not_finite_is_never_the_best_and_said_wherever_it_is_used(spoilt, capsys):
    assert store.steps(spoilt) == [1, 2]
    result = json.loads((spoilt / "result.json").read_text())
    assert result["best/step"] == 1
    assert np.isnan(result["eval/loss"])
    with pytest.warns(UserWarning, match=r"step 2 in .* is not finite: params/.* or NaN"):
        assert resflax.restore(spoilt).step == 2
    assert resflax.restore(spoilt, best=True).step == 1
    with pytest.warns(UserWarning, match="is not finite"):
        assert evaluate.main(["--workdir", str(spoilt)]) == 0
    output = capsys.readouterr()
    assert "step 2  eval loss nan" in output.out
    assert output.err == "warning: the logits of some images are not finite; none counts.\n"
    with pytest.raises(UserError, match=r"step 2 is not finite: .* Move .*/checkpoints/2 away"):
        train.train_and_evaluate(plain_config(**OVERFLOWING), spoilt)
    config = plain_config(**OVERFLOWING, init_from=str(spoilt))
    with (
        pytest.warns(UserWarning, match="is not finite"),
        pytest.raises(UserError, match=r"init_from .*: params/.* or NaN"),
    ):
        train.train_and_evaluate(config, spoilt.parent / "other")


def test_another_config_is_not_replayed(failed):
    with pytest.raises(ValueError, match="the run has another config"):
        replay.replay(plain_config(), failed[0])


def test_a_run_that_did_not_fail_is_not_replayed(tmp_path):
    with pytest.raises(ValueError, match="no step of this run failed"):
        replay.replay(plain_config(), tmp_path)


@pytest.mark.long
def test_updates_are_skipped_and_counted(failed, tmp_path, capsys):
    workdir = tmp_path / "run"
    train.train_and_evaluate(plain_config(**DIVERGING, **{"train.max_skips": 8}), workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    counts = [line["train/skipped"] for line in lines if "train/skipped" in line]
    assert counts == sorted(counts)
    assert counts[-1] >= 1
    first = failure.Failure.read(failed[0]).step
    assert f"of step {first} " in capsys.readouterr().out
    trained = [line for line in lines if "eval/loss" not in line]
    assert all(np.isfinite(value) for line in trained for value in line.values())
    # The parameters are finite, and too large to evaluate: that is said, and no image counts.
    evaluated = [line for line in lines if "eval/loss" in line]
    assert all(np.isnan(line["eval/loss"]) and line["eval/top1"] == 0 for line in evaluated)
    variables = resflax.restore(workdir).variables
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


def test_a_jump_of_the_loss_is_told():
    said = []

    class Console:
        print = said.append

        def progress(self, *arguments):
            pass

    follower = progress.Progress(
        Console(),
        None,
        lambda step: 0.1,
        total_steps=200,
        steps_per_epoch=10,
        batch_size=1,
        every_steps=10,
    )
    rng = np.random.default_rng(0)
    norms = {"grad_norm": 1.0, "top1": 0.0, "skipped": 0.0, "layer_norms": np.ones(2)}
    for step in range(1, 151):
        loss = 9.0 if step == 140 else 2.0 + rng.uniform(-0.1, 0.1)
        follower.steps(step, [{"loss": loss, **norms}])
    (text,) = said
    assert text.startswith("the loss of step 140 (epoch 14.00) jumped to 9.0000, from 2.0")


@pytest.mark.long
def test_skips_before_a_stop_count_too(tmp_path):
    workdir = tmp_path / "run"
    half = plain_config(**DIVERGING | {"train.epochs": 2.0, "train.max_skips": 8})
    train.train_and_evaluate(half, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    skipped = max(line.get("train/skipped", 0) for line in lines)
    assert skipped > 0
    whole = plain_config(**DIVERGING, **{"train.max_skips": skipped})
    with pytest.raises(progress.NonFiniteError, match="of step 5 "):
        train.train_and_evaluate(whole, workdir)
