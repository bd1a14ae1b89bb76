import dataclasses
import json
import pathlib
import runpy

import pytest
from small import config as small_config

from resflax import config as config_lib
from resflax import validation
from resflax.models import create_model, list_models, override_names
from resflax.models.resnet import ResNet

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
DATASETS = {
    "cifar_resnet": ("cifar10", "cifar100"),
    "cifar_resnext": ("cifar10", "cifar100"),
    "densenet": ("cifar10", "cifar100"),
    "fashion_mnist": ("fashion_mnist", "tfds"),
    "finetune": ("folder",),
    "identity_mappings": ("cifar10", "cifar100", "shapes"),
    "imagenet_resnet": ("imagenet2012",),
    "imagenet_resnet_modern": ("imagenet2012",),
    "imagenet_se_resnext": ("imagenet2012",),
    "inception_resnet": ("imagenet2012",),
    "resnet": ("digits", "shapes", "fashion_mnist"),
    "se_resnext": ("digits", "shapes"),
}


def test_every_config_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.py")} == DATASETS.keys()


@pytest.mark.parametrize(
    ("name", "dataset"), [(name, d) for name, datasets in DATASETS.items() for d in datasets]
)
def test_every_config_and_every_run_of_its_sweep_is_valid(name, dataset):
    path = CONFIGS / f"{name}.py"
    module = runpy.run_path(str(path))
    for overrides in ({}, *module["sweep"]()):
        config = module["get_config"](dataset)
        config.lock()
        config.update_from_flattened_dict(overrides)
        validation.validate(config)
    assert len(list(module["sweep"]())) > 1


def test_json_keeps_every_field():
    config = small_config(**{"optim.step_epochs": (30, 60), "model.se_stages": (3, 4)})
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.difference(config, again) == []
    assert again.optim.step_epochs == (30, 60)


def test_json_keeps_tuples_of_tuples():
    config = small_config(**{"optim.multipliers": (("stage2", 0.1, 1.0), ("head", 10.0, 0.0))})
    again = config_lib.from_json(config_lib.to_json(config))
    assert again.optim.multipliers == config.optim.multipliers
    validation.validate(again)


def test_a_config_from_before_there_were_losses_has_the_same_one():
    old = json.loads(config_lib.to_json(small_config(**{"train.label_smoothing": 0.1})))
    del old["loss"]
    old["optim"] = {k: v for k, v in old["optim"].items() if not isinstance(v, dict)}
    config = config_lib.from_json(json.dumps(old))
    assert (config.loss.name, config.train.label_smoothing) == ("cross_entropy", 0.1)
    validation.validate(config)


def test_difference_names_the_fields():
    a, b = small_config(), small_config(**{"model.depth": 20, "optim.lr": 0.3})
    assert config_lib.difference(a, b) == ["model.depth: 11 -> 20", "optim.lr: 0.1 -> 0.3"]


@pytest.mark.parametrize("text", ["", "[]", '{"model": 3}', '{"no": 1}', '{"seed": "x"}'])
def test_json_that_is_no_config_is_refused(text):
    with pytest.raises(config_lib.ConfigError):
        config_lib.from_json(text)


def test_json_is_never_executed(tmp_path):
    text = json.dumps({"seed": f"open({str(tmp_path / 'made')!r}, 'w')"})
    with pytest.raises(config_lib.ConfigError):
        config_lib.from_json(text)
    assert not (tmp_path / "made").exists()


# What residual networks take that no config sets: who trains decides on the first two, and the
# name of a network on the others.
NOT_IN_A_CONFIG = {"axis_name", "gate", "packed", "halve_first", "projection_kernel", "width"}


def test_the_fields_of_the_model_are_the_arguments_of_the_networks():
    config = config_lib.base()
    fields = set(config.model) - {"name", "bn_axis"}
    taken, taken_by_resnets, of_other_types = set(), set(), set()
    for name in list_models():
        network = create_model(name, 10)
        arguments = set(override_names(name))
        taken |= arguments
        if isinstance(network, ResNet):
            taken_by_resnets |= arguments
        # No field changes a network unless it is set.
        config.model.name = name
        assert config_lib.build_model(config, 10, axis_name="devices") == network
        # A flag is parsed as its field's type, so the network's own value must be of that type.
        for field in fields & {f.name for f in dataclasses.fields(network)} - {"dtype"}:
            value = getattr(network, field)
            if value is not None and type(value) is not config.model.get_type(field):
                of_other_types.add((type(network).__name__, field))
    assert fields <= taken
    assert taken_by_resnets - fields == NOT_IN_A_CONFIG
    assert not of_other_types
