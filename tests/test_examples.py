"""Tests of docs/examples, by the command lines of their own docstrings."""

import ast
import pathlib
import runpy
import signal
from functools import partial

import forked
import jax
import numpy as np
import pytest

import resflax
from launch import runs

FOLDER = pathlib.Path("docs/examples")
NAMES = ("eca", "resnet_d", "focal_loss", "layerwise_adamw", "arrays")
MODULES = {"resflax", "resflax.config", "resflax.models.gates"}  # of the package
# Short, but with steps enough after the first checkpoint for a signal to come in time.
SHORT = ("--config.train.epochs=3", "--config.train.batch_size=16")


def tree(name):
    return ast.parse((forked.ROOT / FOLDER / f"{name}.py").read_text())


def command(name, module, folder):
    """The arguments of a command line of the docstring, in another folder than runs/."""
    lines = [line.split() for line in ast.get_docstring(tree(name)).splitlines()]
    (found,) = [line[3:] for line in lines if line[:3] == ["python", "-m", module]]
    return [word.replace("runs/", f"{folder}/") for word in found]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_imports_what_is_public(name):
    code, imported = tree(name), set()
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
            assert not any(alias.name.startswith("_") for alias in node.names)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert {module for module in imported if module.startswith("resflax")} <= MODULES
    strings = [
        n for n in ast.walk(code) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
    ]
    texts = {line for node in strings for line in range(node.lineno, node.end_lineno + 1)}
    source = (forked.ROOT / FOLDER / f"{name}.py").read_text().splitlines()
    lines = [line for number, line in enumerate(source, 1) if line.strip() and number not in texts]
    assert len(lines) < 40


def test_the_averaged_projection_is_that_of_the_package():
    averaged = runpy.run_path(str(forked.ROOT / FOLDER / "resnet_d.py"))["AveragedProjection"]
    images = jax.random.normal(jax.random.key(0), (2, 9, 9, 3))  # of odd sides in two stages
    network = partial(resflax.create_model, "cifar_resnet20", 10, depth=8, num_filters=4)
    ours, mine = network(shortcut="D"), network(shortcut=averaged)
    variables = ours.init(jax.random.key(1), images, train=False)
    shapes = jax.eval_shape(partial(mine.init, train=False), jax.random.key(1), images)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda x: x.shape, shapes)
    outputs = [jax.jit(partial(m.apply, train=False))(variables, images) for m in (ours, mine)]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_trained_stopped_gone_on_with_evaluated_and_restored(name, tmp_path):
    folders = tmp_path / "whole", tmp_path / "stopped"
    whole, stopped = ([*command(name, "resflax.main", folder), *SHORT] for folder in folders)
    result = forked.run("resflax.main", *whole)
    assert (result.code, result.errors) == (0, "")
    own_model = "get_model" in (forked.ROOT / FOLDER / f"{name}.py").read_text()
    assert own_model == (f'config_file="{forked.ROOT / FOLDER / name}.py")' in result.output)

    process = forked.Process("resflax.main", *stopped)
    workdir = pathlib.Path(stopped[stopped.index("--workdir") + 1])
    process.wait_for(workdir / "checkpoints")
    while not list((workdir / "checkpoints").glob("[0-9]*")):
        assert not process.ended, process.finish()
    process.send(signal.SIGTERM)
    assert process.finish().code == 143
    result = forked.run("resflax.main", *stopped)
    assert (result.code, result.errors) == (0, "")
    assert "resumed after step " in result.output

    evaluate = command(name, "resflax.evaluate", folders[1])
    result = forked.run("resflax.evaluate", *evaluate)
    assert result.code == 0, result
    file = str(FOLDER / f"{name}.py")
    mine, other = (
        resflax.restore(folder / workdir.name, config_file=str(forked.ROOT / file))
        for folder in folders
    )
    assert result.output.startswith(f"step {mine.step}  ")
    assert mine.step == other.step
    jax.tree.map(np.testing.assert_array_equal, mine.variables, other.variables)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_swept_over_two_values(name, tmp_path):
    arguments = command(name, "launch.sweep", tmp_path)
    config, workdir = (
        arguments[arguments.index(option) + 1] for option in ("--config", "--workdir")
    )
    short = {"train.epochs": "1"}
    expanded = runs.expand(str(forked.ROOT / config), pathlib.Path(workdir), overrides=short)
    assert len(expanded) == 2
    if name == "resnet_d":  # one by the command itself
        result = forked.Process("launch.sweep", *arguments, "--override", "train.epochs=1").finish(
            600
        )
        assert result.code == 0, result.output
    for run in expanded:
        if name != "resnet_d":
            result = forked.run(*run.command[2:])
            assert (result.code, result.errors) == (0, "")
        restored = resflax.restore(run.workdir, config_file=str(forked.ROOT / config))
        assert restored.step > 0
        flat = resflax.config.flatten(restored.config)
        assert all(
            flat[field] == value for field, value in run.overrides.items() if field not in short
        )
