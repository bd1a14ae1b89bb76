import dataclasses
import json
import pathlib
import runpy

import pytest
from small import config as small_config

from resflax import config as config_lib
from resflax import validation
from resflax.models import create_model, list_models, override_names

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


def arguments(name, model=None):
    """The fields of `config.model` once the arguments of a network are listed."""
    model = config_lib.base().model if model is None else model
    config_lib.list_arguments(model, name)
    return model


def test_every_argument_of_every_network_is_a_field_of_its_type():
    config = config_lib.base()
    for name in list_models():
        network = create_model(name, 10)
        fields = arguments(name)
        assert set(override_names(name)) - {"axis_name", "packed"} <= set(fields)
        # No field changes a network unless it is set.
        config.model.name = name
        assert config_lib.build_model(config, 10, axis_name="devices") == network
        # A flag is parsed as its field's type, so the network's own value must be of that type.
        own = {f.name: getattr(network, f.name) for f in dataclasses.fields(network)}
        for field in set(fields) & set(override_names(name)) & own.keys() - {"dtype"}:
            assert own[field] is None or isinstance(own[field], fields.get_type(field)), field


def test_arguments_that_are_not_set_are_taken_out_again():
    model = config_lib.base().model
    model.update(depth=8, dropout=1)
    arguments("cifar_resnet20", model)
    assert model.growth_rate is None
    assert (model.dropout, model.get_type("dropout")) == (1.0, float)
    config_lib.drop_unset(model)
    assert set(model) == {"name", "dtype", "bn_axis", "depth", "dropout"}


def test_a_json_text_does_not_depend_on_the_order_in_which_arguments_were_set():
    configs = [config_lib.base() for _ in range(3)]
    configs[0].model.update(depth=8, act="silu", se_reduction=None)
    configs[1].model.update(act="silu", depth=8)
    configs[2].model.update(config_lib.from_json(config_lib.to_json(configs[0])).model)
    assert len(set(map(config_lib.to_json, configs))) == 1
    nulls = config_lib.to_json(configs[0]).replace('"depth"', '"block": null, "depth"')
    assert config_lib.difference(config_lib.from_json(nulls), configs[0]) == []
    assert "block" not in config_lib.from_json(nulls).model


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ({"depht": 8}, r"no field 'model\.depht'; did you mean depth\?"),
        ({"growth_rate": 12}, "config.model: cifar_resnet20 has no argument 'growth_rate'; it has"),
        ({"axis_name": "devices"}, "has no argument 'axis_name'"),
        ({"name": "vgg11", "fc_units": "8"}, "fc_units '8' must be of type int"),
        ({"depth": True}, "depth True must be of type int"),
        ({"se_stages": [3, 4]}, r"config\.model\.se_stages \[3, 4\] must be a number, a text or a"),
    ],
)
def test_an_argument_that_the_network_has_not_is_said(arguments, right):
    config = config_lib.base()
    config.model.update(arguments)
    with pytest.raises(config_lib.ConfigError, match=right):
        validation.validate(config)


def test_the_arguments_of_networks_that_are_not_residual_can_be_set():
    config = config_lib.base()
    config.model.update(name="vgg11", fc_units=8)
    assert config_lib.build_model(config, 10).fc_units == 8
    config.model.update(name="alexnet", fc_units=None, dropped=("fc6",))
    assert config_lib.build_model(config, 10).dropped == ("fc6",)
