"""Tests of what a run notes of its blocks while it trains."""

import json

import jax
import numpy as np
import pytest
from plain import config as plain_config

import resflax
from resflax.analysis import signal, taps, units
from resflax.analysis.monitor import Monitor
from resflax.config import build_model
from resflax.data import sources
from resflax.train import train_and_evaluate


def looks(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "analysis/step" in line]


@pytest.mark.long
@pytest.mark.devices(8)
@pytest.mark.parametrize(("mode", "depth"), [("shard_map", 14), ("pmap", 8)])
def test_a_run_looks_at_its_blocks(tmp_path, mode, depth):
    overrides = {"analysis.every": 2, "log.every_steps": 1, "parallel.mode": mode}
    overrides |= {"model.name": "cifar_resnet20", "model.depth": depth, "model.num_filters": 4}
    overrides |= {"model.cardinality": None, "model.base_width": None, "model.scan": 2}
    config = plain_config(**overrides, **{"train.epochs": 2.0})
    train_and_evaluate(config, tmp_path)
    found = looks(tmp_path)
    steps = [line["analysis/step"] for line in found]
    assert steps == list(range(2, steps[-1] + 1, 2))
    assert all(line["step"] >= line["analysis/step"] for line in found)
    # The last one's is of the state that was saved, where the run ended with a look.
    run = resflax.restore(tmp_path)
    expected = Monitor(run.model, sources.load(config.data))(run.variables)
    if steps[-1] == run.step:
        assert found[-1]["analysis/gradient/stage3_block1"] == pytest.approx(
            expected["gradient/stage3_block1"], rel=1e-3
        )
    assert {f"analysis/{name}" for name in expected} | {"analysis/step"} == {
        name for name in found[-1] if name.startswith("analysis/")
    }


@pytest.mark.long
def test_the_numbers_are_those_of_the_analyses():
    config = plain_config(**{"model.se_reduction": 2})
    dataset = sources.load(config.data)
    model = build_model(config, 10)
    images = jax.numpy.zeros((1, *dataset.description.image_shape))
    variables = model.init(jax.random.key(0), images, train=False)
    numbers = Monitor(model, dataset)(variables)
    plain = taps.written_out(model)
    batch = dataset.test.test_batch(np.arange(32))
    mean, std = dataset.description.mean, dataset.description.std
    images = (batch["image"] / 255.0 - np.array(mean)) / np.array(std)
    images = images.astype(np.float32)
    for s in signal.meter(plain)(variables, images, batch["label"]):
        assert numbers[f"variance/{s.block}"] == pytest.approx(s.variance, rel=1e-4)
        assert numbers[f"gradient/{s.block}"] == pytest.approx(s.gradient, rel=1e-3)
        assert numbers[f"parameters/{s.block}"] == pytest.approx(s.parameters, rel=1e-3)
    for u in units.meter(plain)(variables, [(images, batch["label"])]):
        assert numbers[f"zeros/{u.block}"] == pytest.approx(u.zeros, abs=1e-4)
        assert numbers[f"dead/{u.block}"] == pytest.approx(u.dead_share, abs=1e-4)
        assert f"saturated/{u.block}" not in numbers
        if u.gates:
            assert numbers[f"gates/{u.block}"] == pytest.approx(u.closed + u.open, abs=1e-4)
    assert numbers["gates/stage2_block1"] < 0.5


@pytest.mark.long
def test_units_of_sigmoids_saturate():
    config = plain_config(**{"model.act": "sigmoid"})
    dataset = sources.load(config.data)
    model = build_model(config, 10)
    images = jax.numpy.zeros((1, *dataset.description.image_shape))
    variables = model.init(jax.random.key(0), images, train=False)
    numbers = Monitor(model, dataset)(variables)
    batch = [(Monitor(model, dataset)._images, None)]
    for u in units.meter(taps.written_out(model))(variables, batch):
        assert numbers[f"saturated/{u.block}"] == pytest.approx(u.saturated, abs=1e-4)
    assert not any(name.startswith("dead/") for name in numbers)
