"""Tests of a config file's own network, loss, optimizer and data."""

import json
import pathlib
import shutil
import signal
from unittest import mock

import flax.linen as nn
import forked
import jax
import jax.numpy as jnp
import numpy as np
import optax
import own
import pytest
from test_legacy import LOGITS, LOOK, RUN

import resflax
from resflax import evaluate, train
from resflax.data import sources
from resflax.errors import UserError
from resflax.parts import NAMES, Parts
from resflax.process import command
from resflax.report import runs, study
from resflax.run import summary
from resflax.run import workdir as workdir_lib

OWN = pathlib.Path(own.__file__)
CONFIG = ("--config", "tests/own.py")
PLAIN = ("--config", "tests/plain.py", "--config.train.epochs=1")


class Trainless(nn.Module):
    """A network that cannot be told whether it is trained."""

    def __call__(self, images):
        return images


class Callless(nn.Module):
    """A network that cannot be called at all."""


class Flat(nn.Module):
    """A network whose logits are of too few classes."""

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(3)(images.mean((1, 2)))


class Failing(nn.Module):
    """A network that cannot be called."""

    def __call__(self, images, **_):
        return images @ jnp.zeros((7, 7))


def parts(**functions):
    names = {f"get_{name}": getattr(own, f"get_{name}") for name in NAMES} | functions
    return Parts.defined(str(OWN), names)


@pytest.mark.parametrize(
    ("functions", "right"),
    [
        ({"get_model": lambda c, n: 3}, r"get_model\(\) gives int; it must return a flax.linen"),
        ({"get_model": lambda c, n: own.Net}, r"get_model\(\) gives Net; it must return a flax"),
        ({"get_model": lambda c, n: Trainless()}, "Trainless.__call__ has no argument 'train'"),
        ({"get_model": lambda c, n: Callless()}, "Callless.__call__ has no argument 'train'"),
        ({"get_model": lambda c, n: Flat()}, r"Flat gives \(2, 3\) for .*; it must give \(2, 10\)"),
        ({"get_model": lambda c, n: Failing()}, r"test_parts\.py:\d+: TypeError: "),
        ({"get_model": lambda c, n: 1 // 0}, r"test_parts\.py:\d+: ZeroDivisionError: "),
        ({"get_loss": lambda c: "focal"}, r"get_loss\(\) gives str; it must return a function"),
        ({"get_loss": lambda c: lambda x, y: x.mean()}, r"the loss .* gives \(\) for \(2, 10\)"),
        ({"get_loss": lambda c: lambda x: x}, "TypeError: "),
        ({"get_optimizer": lambda c, s: s}, r"get_optimizer\(\) gives .* an optax"),
        ({"get_dataset": lambda c: [1]}, r"get_dataset\(\) gives list; it must return images"),
        ({"get_dataset": 3}, "get_dataset must be a function"),
    ],
)
def test_a_part_that_cannot_be_is_said_before_anything_is_written(tmp_path, functions, right):
    with pytest.raises(UserError, match=right):
        train.train_and_evaluate(own.get_config(), tmp_path / "run", parts(**functions))
    assert not list(tmp_path.iterdir())


def test_a_loss_is_tried_with_the_targets_that_it_will_get(tmp_path):
    config = own.get_config()
    config.mix.mixup = 0.2
    with pytest.raises(UserError, match=r"own\.py:\d+: \w+: "):  # focal takes no probabilities
        train.train_and_evaluate(config, tmp_path / "run", parts())


def test_a_config_file_gives_its_parts_and_takes_flags_of_its_own_fields():
    config, found = command.read(str(OWN))
    assert config.model.width == 4
    assert found.own == list(NAMES)
    assert command.load(str(OWN), ["--config.model.width=6"]).model.width == 6
    with pytest.raises(UserError, match="no field 'widht'; did you mean width"):
        command.load(str(OWN), ["--config.model.widht=6"])


def test_the_network_of_the_user_follows_the_training_s_settings():
    config = own.get_config()
    config.model.bn_axis = "global"
    config.train.trainable = "head"
    network = resflax.create_model("cifar_resnet20", 10)
    built = Parts.of_objects(model=network).build_model(config, 10, "devices")
    assert (built.axis_name, built.scan) == ("devices", 0)
    assert Parts.of_objects(model=network).build_model(own.get_config(), 10, "devices") == network


def test_parts_are_noted_and_must_stay(tmp_path):
    workdir_lib.open_parts(tmp_path, {})
    assert workdir_lib.read_parts(tmp_path) == {}
    workdir_lib.open_parts(tmp_path, {"model": "Net in own.py"})
    assert workdir_lib.read_parts(tmp_path) == {"model": "Net in own.py"}
    workdir_lib.open_parts(tmp_path, {"loss": "defined in own.py"})  # nothing was saved yet
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"begun with get_loss .* cannot go on without it"):
        workdir_lib.open_parts(tmp_path, {})
    with pytest.raises(UserError, match=r"begun without get_model .* cannot go on with it"):
        workdir_lib.open_parts(tmp_path, {"loss": "moved", "model": "Net in own.py"})
    workdir_lib.open_parts(tmp_path, {"loss": "moved"})
    (tmp_path / "parts.json").write_text("[")
    with pytest.raises(UserError, match=r"parts\.json cannot be read"):
        workdir_lib.read_parts(tmp_path)


@pytest.fixture
def run(tmp_path):
    """A run whose network is the user's own, as its directory says."""
    folder = pathlib.Path(shutil.copytree(RUN, tmp_path / "run"))
    (folder / "parts.json").write_text('{"model": "ResNet in mine.py"}')
    return folder


def test_a_run_with_a_network_of_its_own_is_restored_with_it_alone(run, tmp_path, capsys):
    needed = "is of the run's own config file .*ResNet in mine.py.*--config_file FILE.py"
    with pytest.raises(UserError, match=needed):
        resflax.restore(run)
    assert evaluate.main(["--workdir", str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match=needed):
        runs.size(runs.read(run))
    network = resflax.create_model("cifar_resnet20", 10, depth=8, num_filters=4)
    restored = resflax.restore(run, model=network)
    logits = restored.model.apply(restored.variables, LOOK, train=False)
    np.testing.assert_allclose(logits, LOGITS, rtol=1e-3, atol=1e-4)
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import resflax\n\ndef get_model(config, num_classes):\n"
        "    return resflax.create_model('cifar_resnet20', num_classes, depth=8, num_filters=4)\n"
    )
    assert resflax.restore(run, config_file=f"{mine}:digits").model == network
    with pytest.raises(ValueError, match="in this run it is float32"):
        resflax.restore(run, model=resflax.create_model("cifar_resnet20", 10, depth=8))
    with pytest.raises(UserError, match="exclude each other"):
        resflax.restore(run, model=network, config_file=str(mine))


def test_a_report_counts_a_network_of_the_user_s_own_where_it_is_given(run):
    found = runs.read(run)
    (group,) = study.compare([found]).groups
    assert group.size is None
    network = resflax.create_model("cifar_resnet20", 10, depth=8, num_filters=4)
    (group,) = study.compare([found], Parts.of_objects(model=network)).groups
    assert group.size.params == 4934
    other = resflax.create_model("cifar_resnet20", 10, depth=14)
    assert runs.size(runs.read(RUN), Parts.of_objects(model=other)).params == 4934


def test_a_data_set_of_the_user_s_own_is_asked_for_unless_there_is_another(run):
    (run / "parts.json").write_text('{"dataset": "digits in mine.py"}')
    restored = resflax.restore(run)
    with pytest.raises(UserError, match=r"the data set of .* \(get_dataset: digits in mine.py\)"):
        restored.load_dataset()
    assert restored.load_dataset({"source": "digits"}).description.name == "digits"


def start(workdir, *flags):
    return forked.Process("resflax.main", *CONFIG, *flags, "--workdir", workdir)


@pytest.mark.parametrize(
    ("own_parts", "right"),
    [
        (Parts(), '("runs/a")'),
        (parts(get_model=None), '("runs/a")'),
        (parts(), f'("runs/a", config_file="{OWN}")'),
        (Parts.of_objects(model=Callless()), '("runs/a", model=model)'),
    ],
)
def test_a_run_says_how_its_network_is_restored(own_parts, right):
    result = {"eval/loss": 1.0, "eval/top1": 0.5, "best/top1": 0.5, "best/step": 2, "seconds": 3}
    console = mock.Mock()
    summary.conclude(console, pathlib.Path("runs/a"), own_parts, result, 1.0)
    assert f"resflax.restore{right}  #" in console.print.call_args.args[0]


@pytest.mark.long
def test_a_run_of_one_s_own_is_trained_stopped_gone_on_with_evaluated_and_restored(
    tmp_path, capsys
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = start(whole).finish()
    assert (result.code, result.errors) == (0, "")
    assert "model of the user's own: Net in tests/own.py" in result.output
    assert "shapes of my own" in result.output
    assert set(json.loads((whole / "parts.json").read_text())) == set(NAMES)

    process = start(stopped, "--config.train.epochs=300")
    process.wait_for(stopped / "checkpoints/2")
    process.send(signal.SIGTERM)
    assert process.finish(60).code == 143
    plain = (*PLAIN, "--workdir", stopped)
    for flags, right in (
        (plain, "another config"),
        ((*CONFIG, "--config.model.width=6", "--workdir", stopped), "model.width: 4 -> 6"),
    ):
        refused = forked.run("resflax.main", *flags)
        assert refused.code == 2
        assert refused.errors.count("\n") == 1
        assert right in refused.errors
    step = max(int(folder.name) for folder in (stopped / "checkpoints").iterdir())
    result = start(stopped, f"--config.train.epochs={step // 2 + 1}").finish()
    assert (result.code, result.errors) == (0, "")
    assert f"resumed after step {step} of" in result.output

    capsys.readouterr()
    assert evaluate.main(["--workdir", str(whole)]) == 2
    assert "--config_file FILE.py" in capsys.readouterr().err
    assert evaluate.main(["--workdir", str(whole), "--config_file", str(OWN)]) == 0
    assert capsys.readouterr().out.startswith("step 6  ")
    run = resflax.restore(whole, config_file=str(OWN))
    assert type(run.model).__name__ == "Net"
    assert run.load_dataset().description.name == "shapes of my own"
    again = evaluate.evaluate_run(whole, config_file=str(OWN))
    result = json.loads((whole / "result.json").read_text())
    assert again["top1"] == result["eval/top1"]
    looked = ("--workdir", whole, "--images", "8", "--out", tmp_path / "looked")
    result = forked.run("resflax.analyze", "landscape", *looked)
    assert (result.code, result.errors.count("\n")) == (2, 1)


@pytest.mark.long
def test_values_of_one_s_own_are_swept(tmp_path):
    command_line = (*CONFIG, "--workdir", str(tmp_path), "--override", "train.epochs=1")
    result = forked.Process("launch.sweep", *command_line).finish(600)
    assert result.code == 0, result.output
    for width in (4, 6):
        run = resflax.restore(tmp_path / f"width={width}", config_file=str(OWN))
        assert run.variables["params"]["Conv_0"]["kernel"].shape[-1] == width


@pytest.mark.long
def test_objects_are_parts_too(tmp_path):
    config = own.get_config()
    seen = []

    def loss(logits, targets):
        seen.append(targets.shape)
        return own.focal(logits, targets)

    mine = {"model": own.Net(10, 4), "loss": loss, "optimizer": optax.adamw(0.01)}
    dataset = sources.load(config.data)
    with jax.numpy_rank_promotion("allow"):
        result = resflax.train_and_evaluate(config, tmp_path / "run", **mine, dataset=dataset)
    assert seen
    assert result["eval/loss"] > 0
    assert set(workdir_lib.read_parts(tmp_path / "run")) == set(NAMES)
    restored = resflax.restore(tmp_path / "run", model=mine["model"])
    assert restored.step == 6
