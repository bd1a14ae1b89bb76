import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from small import config as small_config

import resflax
from resflax import config as config_lib
from resflax import progress, train

# One device, as in most runs, and fewer seconds to compile than eight.
ONE_DEVICE = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(pathlib.Path(__file__).parent)}

TRAIN = """
import json, pathlib, sys
from small import config
from resflax.train import train_and_evaluate
train_and_evaluate(config(**json.loads(sys.argv[2])), pathlib.Path(sys.argv[1]))
"""


def start(workdir, fields):
    command = [sys.executable, "-c", TRAIN, str(workdir), json.dumps(fields)]
    return subprocess.Popen(command, env=ONE_DEVICE, stdout=subprocess.PIPE, text=True)


def finish(workdir, fields):
    process = start(workdir, fields)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output


def assert_same_run(a, b):
    a, b = resflax.restore(a), resflax.restore(b)
    assert a.step == b.step
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)


# Everything that could go wrong on resuming: averages, dropout, augmentation, momentum, schedule.
FIELDS = {
    "train.epochs": 3.0,
    "train.ema_decay": 0.9,
    "model.dropout": 0.2,
    "optim.warmup_epochs": 1.0,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, finish(workdir, FIELDS)


def test_a_run_leaves_its_files(finished):
    workdir, output = finished
    files = {"config.json", "dataset.json", "metrics.jsonl", "curves.png", "result.json"}
    assert files <= {path.name for path in workdir.iterdir()}
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval/top1" in line] == [2, 4, 6]
    result = json.loads((workdir / "result.json").read_text())
    assert result["eval/top1"] == lines[-1]["eval/top1"]
    assert result["best/top1"] == max(line.get("eval/top1", 0) for line in lines)
    assert f'resflax.restore("{workdir}")' in output


def test_the_restored_network_gives_the_reported_accuracy(finished):
    workdir, _ = finished
    run = resflax.restore(workdir)
    from resflax.data import sources

    test = sources.load(run.config.data).test
    logits = run.model.apply(run.variables, run.preprocess(test.images), train=False)
    accuracy = np.mean(np.argmax(logits, -1) == test.labels)
    result = json.loads((workdir / "result.json").read_text())
    assert accuracy == pytest.approx(result["eval/top1"])
    assert run.step == 6
    assert run.config.model.se_reduction == 4
    assert len(run.dataset.label_names) == 10


def test_best_and_step_choose_the_checkpoint(finished):
    workdir, _ = finished
    result = json.loads((workdir / "result.json").read_text())
    assert resflax.restore(workdir, best=True).step == result["best/step"]
    assert resflax.restore(workdir, step=4).step == 4
    with pytest.raises(ValueError, match=r"no checkpoint of step 3; it has (2, )?4, 6"):
        resflax.restore(workdir, step=3)
    with pytest.raises(ValueError, match="holds no run"):
        resflax.restore(workdir / "nothing")


def test_a_killed_run_goes_on_bit_for_bit(finished, tmp_path):
    process = start(tmp_path / "run", FIELDS)
    deadline = time.monotonic() + 100
    while not (tmp_path / "run/checkpoints/2").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run/result.json").exists()
    assert "resumed after step" in finish(tmp_path / "run", FIELDS)
    assert_same_run(finished[0], tmp_path / "run")


def test_a_run_stopped_between_checkpoints_goes_on_bit_for_bit(tmp_path, monkeypatch):
    config = small_config(**{"train.epochs": 2.0, "model.bn_axis": "global"})
    result = train.train_and_evaluate(config, tmp_path / "whole")
    assert result["best/step"] in (2, 4)

    def stop(self, step, metrics, step_of=progress.Progress.step):
        step_of(self, step, metrics)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(progress.Progress, "step", stop)
        train.train_and_evaluate(config, tmp_path / "stopped")
    assert resflax.restore(tmp_path / "stopped").step == 2
    resumed = train.train_and_evaluate(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert resumed["eval/loss"] == result["eval/loss"]

    again = train.train_and_evaluate(config, tmp_path / "stopped")
    assert again["eval/loss"] == result["eval/loss"]


def test_another_config_does_not_touch_the_run(finished):
    workdir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    config = small_config(**{**FIELDS, "model.shortcut": "A"})
    with pytest.raises(ValueError, match=r"model\.shortcut: None -> 'A'"):
        train.train_and_evaluate(config, workdir)
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path):
    config = small_config(**{"optim.lr": 1e20, "optim.momentum": 0.0, "train.epochs": 4.0})
    with pytest.raises(progress.NonFiniteError, match=r"of step \d .* is (nan|inf)"):
        train.train_and_evaluate(config, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").glob("[0-9]*"):
        variables = resflax.restore(tmp_path / "run", step=int(path.name)).variables
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables["params"]))


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    config = small_config(**{"train.batch_size": 128})
    with pytest.raises(ValueError, match="128 is more than the 64 training images"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        train.train_and_evaluate(small_config(), tmp_path / "file")
    with pytest.raises(ValueError, match="cannot be made"):
        train.train_and_evaluate(small_config(), tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_files_of_an_unknown_run_are_not_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"metrics\.jsonl but no config\.json"):
        train.train_and_evaluate(small_config(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "mine"


def test_the_config_is_checked_before_anything_is_written(tmp_path):
    with pytest.raises(config_lib.ConfigError, match="shortcut 'Z'"):
        train.train_and_evaluate(small_config(**{"model.shortcut": "Z"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
