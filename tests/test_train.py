import collections
import json
import shutil
import signal

import forked
import jax
import numpy as np
import pytest
from plain import config as plain_config

import resflax
from resflax import config as config_lib
from resflax import train
from resflax.checkpoint import store
from resflax.data import sources
from resflax.run import progress

# Everything that could go wrong on resuming: averages, dropout, augmentation, momentum, schedule.
FLAGS = (
    "--config.train.epochs=6",
    "--config.train.ema_decay=0.9",
    "--config.model.dropout=0.2",
    "--config.optim.warmup_epochs=1",
)


def start(workdir, *flags):
    """The plain run as a process of its own, on one device."""
    command = ("--config", "tests/plain.py", *FLAGS, *flags, "--workdir", workdir)
    return forked.Process("resflax.main", *command)


def finish(workdir, *flags):
    result = start(workdir, *flags).finish()
    assert result.code == 0, result.errors
    return result.output


def stop(workdir, number, *flags, step=2):
    """Starts the run, stops it after its first checkpoint, and returns its exit code."""
    process = start(workdir, *flags)
    process.wait_for(workdir / f"checkpoints/{step}")
    process.send(number)
    code = process.finish(60).code
    assert not (workdir / "result.json").exists()
    return code


def metrics_of(workdir):
    """A run's metrics by name and step."""
    metrics = collections.defaultdict(dict)
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            metrics[name][json.loads(line)["step"]] = value
    return metrics


def assert_same_run(a, b):
    a, b = resflax.restore(a), resflax.restore(b)
    assert a.step == b.step
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, finish(workdir)


def test_a_run_leaves_its_files(finished):
    workdir, output = finished
    files = {"config.json", "dataset.json", "metrics.jsonl", "curves.png", "result.json"}
    assert files <= {path.name for path in workdir.iterdir()}
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval/top1" in line] == list(range(2, 13, 2))
    result = json.loads((workdir / "result.json").read_text())
    assert result["eval/top1"] == lines[-1]["eval/top1"]
    assert result["best/top1"] == max(line.get("eval/top1", 0) for line in lines)
    assert f'resflax.restore("{workdir}")' in output


def test_the_restored_network_gives_the_reported_accuracy(finished):
    workdir, _ = finished
    run = resflax.restore(workdir)
    test = sources.load(run.config.data).test
    logits = run.model.apply(run.variables, run.preprocess(test.images), train=False)
    accuracy = np.mean(np.argmax(logits, -1) == test.labels)
    result = json.loads((workdir / "result.json").read_text())
    assert accuracy == pytest.approx(result["eval/top1"])
    assert run.step == 12
    assert run.config.model.num_filters == 4
    assert len(run.dataset.label_names) == 10


def test_best_and_step_choose_the_checkpoint(finished):
    workdir, _ = finished
    result = json.loads((workdir / "result.json").read_text())
    assert resflax.restore(workdir, best=True).step == result["best/step"]
    assert resflax.restore(workdir, step=10).step == 10
    with pytest.raises(ValueError, match=r"no checkpoint of step 3; it has (\d+, )?10, 12"):
        resflax.restore(workdir, step=3)
    with pytest.raises(ValueError, match="holds no run"):
        resflax.restore(workdir / "nothing")


@pytest.mark.long
def test_a_finished_run_is_evaluated_again_and_not_trained(finished):
    workdir, _ = finished
    before = json.loads((workdir / "result.json").read_text())
    assert "resumed after step 12 of 12" in finish(workdir)
    after = json.loads((workdir / "result.json").read_text())
    assert {k: v for k, v in after.items() if k != "seconds"} == {
        k: v for k, v in before.items() if k != "seconds"
    }


def test_a_killed_run_goes_on_bit_for_bit(finished, tmp_path):
    assert stop(tmp_path / "run", signal.SIGKILL) == -signal.SIGKILL
    assert "resumed after step" in finish(tmp_path / "run")
    assert_same_run(finished[0], tmp_path / "run")


@pytest.mark.long
def test_damage_is_walked_back_from(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "result.json").unlink()
    path = max((workdir / "checkpoints/12/ema").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="step 12 is damaged.* Step 10 is restored"):
        assert resflax.restore(workdir).step == 10
    with pytest.raises(ValueError, match=f"step 12 is damaged: {path} is not what was written"):
        resflax.restore(workdir, step=12)
    output = " ".join(finish(workdir).split())
    assert f"moved to {workdir / 'damaged_checkpoints/12'}; the run has step 10" in output
    assert "resumed after step 10 of 12" in output
    assert_same_run(finished[0], workdir)


@pytest.mark.long
def test_several_steps_in_a_call_change_nothing(finished, tmp_path):
    # An evaluation every 4 steps: calls of 3, and of 1.
    flags = ("--config.train.steps_per_call=3", "--config.eval.every_epochs=2")
    flags += ("--config.checkpoint.every_epochs=2",)
    stop(tmp_path / "run", signal.SIGKILL, *flags, step=4)
    assert "resumed after step" in finish(tmp_path / "run", *flags)
    assert_same_run(finished[0], tmp_path / "run")
    apart, together = metrics_of(finished[0]), metrics_of(tmp_path / "run")
    assert sorted(together["train/loss"]) == list(range(1, 13))
    for name in ("train/loss", "train/top1", "train/grad_norm", "train/lr"):
        assert together[name] == apart[name]
    assert list(together["eval/top1"]) == [4, 8, 12]
    assert together["eval/top1"].items() <= apart["eval/top1"].items()


@pytest.mark.long
def test_it_does_not_matter_where_the_examples_live(finished, tmp_path):
    output = finish(tmp_path / "run", "--config.data.placement=host")
    assert "resumed" not in output
    assert_same_run(finished[0], tmp_path / "run")
    assert set(metrics_of(tmp_path / "run")["train/data_wait"].values()) <= {0.0, 1.0}


def test_a_call_longer_than_the_evaluations_allow_is_refused(tmp_path):
    config = plain_config(**{"train.steps_per_call": 3})
    with pytest.raises(ValueError, match="3 is more than the 2 steps until"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_stopped_run_saves_its_state_says_how_to_go_on_and_does(finished, tmp_path, number, code):
    # So that only a stop saves anything between the first epoch and the last.
    rarely = ("--config.eval.every_epochs=5", "--config.checkpoint.every_epochs=5")
    process = start(tmp_path / "run", *rarely)
    process.wait_for(tmp_path / "run/metrics.jsonl")
    process.send(number)
    result = process.finish(60)
    assert result.code == code
    assert f"--workdir {tmp_path / 'run'} goes on" in result.errors
    assert "Traceback" not in result.errors
    (step,) = store.steps(tmp_path / "run")
    assert step < 10
    assert f"resumed after step {step} of 12" in finish(tmp_path / "run", *rarely)
    assert_same_run(finished[0], tmp_path / "run")


def test_another_config_does_not_touch_the_run(finished):
    workdir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    config = resflax.restore(workdir).config
    config.model.shortcut = "A"
    with pytest.raises(ValueError, match=r"model\.shortcut: None -> 'A'"):
        train.train_and_evaluate(config, workdir)
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


@pytest.mark.long
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path):
    config = plain_config(**{"optim.lr": 1e20, "optim.momentum": 0.0, "train.epochs": 4.0})
    with pytest.raises(progress.NonFiniteError, match=r"of step \d .* is (nan|inf)"):
        train.train_and_evaluate(config, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").glob("[0-9]*"):
        variables = resflax.restore(tmp_path / "run", step=int(path.name)).variables
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables["params"]))


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    config = plain_config(**{"train.batch_size": 128})
    with pytest.raises(ValueError, match="128 is more than the 64 training images"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        train.train_and_evaluate(plain_config(), tmp_path / "file")
    with pytest.raises(ValueError, match="cannot be made"):
        train.train_and_evaluate(plain_config(), tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_files_of_an_unknown_run_are_not_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"metrics\.jsonl but no config\.json"):
        train.train_and_evaluate(plain_config(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "mine"


def test_the_config_is_checked_before_anything_is_written(tmp_path):
    with pytest.raises(config_lib.ConfigError, match="shortcut 'Z'"):
        train.train_and_evaluate(plain_config(**{"model.shortcut": "Z"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
