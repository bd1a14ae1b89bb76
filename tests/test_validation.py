"""Tests of what makes a config valid."""

import contextlib
import re

import hypothesis
import hypothesis.strategies as st
import pytest
from small import config as small_config

from resflax import config as config_lib
from resflax import validation


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("model.dtype", "float16", "'float32', 'bfloat16'"),
        ("model.bn_axis", "all", "'device', 'global'"),
        ("data.source", "mnist", "'digits', 'shapes'"),
        ("optim.schedule", "linear", "'cosine', 'step'"),
        ("parallel.mode", "pjit", "'shard_map', 'jit', 'pmap'"),
        ("train.batch_size", 0, "at least 1"),
        ("train.steps_per_call", -1, "at least 0"),
        ("train.epochs", 0.0, "more than 0"),
        ("train.epochs", float("nan"), "more than 0"),
        ("train.epochs", float("inf"), "more than 0"),
        ("train.label_smoothing", 1.0, "less than 1"),
        ("train.ema_decay", -0.1, "at least 0"),
        ("optim.lr", -1.0, "at least 0"),
        ("optim.lr", float("inf"), "must be finite"),
        ("optim.lr", 1e39, "must be finite"),  # infinite in float32
        ("optim.step_factor", float("nan"), "must be finite"),
        ("optim.step_epochs", (1.0, float("inf")), "at most 1,000,000"),
        ("model.skip_scale", float("inf"), "a finite number"),
        ("data.crop_ratio", (0.75, float("inf")), "must be finite"),
        ("augment.erasing_value", float("nan"), "must be finite"),
        ("optim.warmup_epochs", 3.0, "longer than config.train.epochs"),
        ("optim.step_epochs", (60, 30), "must increase"),
        ("data.image_size", 8, "at least 16"),
        ("data.shapes.difficulty", 2.0, "from 0 to 1"),
        ("seed", -1, "from 0"),
        ("model.se_reduction", 1000, "at most"),
        ("model.unit", "preact", "'full_preact'"),
    ],
)
def test_a_field_out_of_range_is_refused(field, value, right):
    with pytest.raises(config_lib.ConfigError, match=right) as error:
        validation.validate(small_config(**{field: value}))
    assert field.split(".")[-1] in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "right"),
    [
        ({"data.placement": "disk"}, "'auto', 'device', 'host'"),
        ({"data.crop": "none"}, "'center', 'resized', 'scale'"),
        ({"data.crop_scale": (0.5, 2.0)}, "the least and the most, at most 1.0"),
        ({"data.crop_ratio": (0.0, 1.0)}, "two positive numbers"),
        ({"data.crop_shorter": (480, 256)}, "two positive numbers, the least and the most"),
        (
            {"data.crop": "scale", "data.crop_shorter": (8, 20)},
            "at least config.data.image_size 16",
        ),
        ({"data.eval_resize": 8}, "at least config.data.image_size 16"),
        ({"data.test_crops": 5}, "1 or 10"),
        ({"data.test_crops": 10, "data.eval_resize": 16}, "must be more than their 16 pixels"),
        ({"data.image_size": 0}, "the usual size of a common TFDS data set (imagenet2012, "),
        (
            {"data.mean": (float("nan"),), "data.std": (1.0,)},
            "config.data.mean (nan,) must be finite",
        ),
        ({"data.max_bad": 1.5}, "at least 0.0 and less than 1.0"),
        ({"optim.name": "adam"}, "'sgd', 'rmsprop'"),
        ({"loss.name": "hinge"}, "'cross_entropy', 'binary', 'focal', 'distillation'"),
        (
            {"loss.focal.gamma": 3.0},
            "config.loss.focal.gamma 3.0 must be 2.0: config.loss.name is 'cross_entropy'",
        ),
        ({"loss.name": "focal", "loss.focal.gamma": -1.0}, "config.loss.focal: gamma -1.0 must be"),
        ({"loss.name": "focal", "train.label_smoothing": 0.1}, "the loss 'focal' has none"),
        ({"loss.name": "binary", "loss.binary.threshold": 2.0}, "binary: threshold 2.0 must be"),
        ({"loss.name": "distillation"}, "config.loss.distillation: teacher must be"),
        ({"optim.adamw.b1": 0.5}, "config.optim.adamw.b1 0.5 must be 0.9: config.optim.name is"),
        ({"optim.name": "adamw", "optim.adamw.b1": 1.5}, "config.optim.adamw: b1 1.5 must be from"),
        (
            {"optim.name": "adamw", "optim.momentum": 0.5},
            "config.optim.momentum 0.5 must be 0.9: the optimizer 'adamw' has none",
        ),
        ({"optim.name": "lars", "optim.rms_decay": 0.5}, "the optimizer 'lars' has none"),
        ({"optim.clip_adaptive": -0.1}, "at least 0"),
        ({"optim.sam_rho": float("nan")}, "at least 0"),
        (
            {"optim.multipliers": ("head", 1.0, 1.0)},
            "'head' must be a regular expression, a factor",
        ),
        ({"optim.multipliers": (("head", -1.0, 1.0),)}, "such as ('head', 10.0, 1.0)"),
        ({"optim.multipliers": (("(", 1.0, 1.0),)}, "'(' is none"),
        ({"augment.erasing": 1.5}, "config.augment.erasing 1.5 must be from 0 to 1"),
        ({"mix.cutmix": -1.0}, "config.mix.cutmix -1.0"),
    ],
)
def test_what_cannot_be_is_told_with_what_would_be_right(overrides, right):
    with pytest.raises(config_lib.ConfigError, match=re.escape(right)):
        validation.validate(small_config(**overrides))


FIELDS = config_lib.flatten(small_config())
WHOLE = st.one_of(st.integers(), st.sampled_from([0, 1, -1, 2**31, 2**32, 2**63]))
NUMBERS = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, -1.0, 1e308]))
TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["", "A", "none", "(", "..", "/", "tfds"]))
# What a command line can set a field of a type to; None stands for a placeholder.
VALUES = {
    bool: st.booleans(),
    int: WHOLE,
    float: NUMBERS,
    str: TEXTS,
    tuple: st.lists(st.one_of(NUMBERS, WHOLE, TEXTS), max_size=4).map(tuple),
    type(None): st.one_of(WHOLE, NUMBERS, TEXTS, st.booleans()),
}


@pytest.mark.long
@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(data=st.data())
def test_no_override_makes_a_traceback(data):
    config = small_config()
    for field in data.draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=3)):
        value = data.draw(VALUES[type(FIELDS[field])], label=field)
        try:
            config.update_from_flattened_dict({field: value})
        except TypeError:  # a placeholder's type, which the command line checks
            hypothesis.reject()
    with contextlib.suppress(config_lib.ConfigError):
        validation.validate(config)


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("data.image_size", 10**9, "at most 16,384"),
        ("eval.batch_size", 2**30, "at most 1,048,576"),
        ("model.depth", 2**40, "less than 2**31"),
        ("model.depth", 2**21 * 6 + 2, "at most 65,536"),
        ("augment.rand_augment_layers", 10**6, "at most 100"),
        ("optim.step_epochs", (-5.0,), "from 0"),
    ],
)
def test_a_size_that_would_take_all_of_a_machine_is_refused(field, value, right):
    config = small_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(config_lib.ConfigError, match=re.escape(right)):
        validation.validate(config)


def test_a_config_has_the_fields_of_the_base_and_their_types():
    config = small_config()
    with config.unlocked():
        config.train.epoch = 3.0
    with pytest.raises(config_lib.ConfigError, match=r"no field 'train\.epoch'; did you mean"):
        validation.validate(config)
    with pytest.raises(AttributeError, match='Did you mean "epochs"'):
        config_lib.base().train.epoch = 3.0
    text = config_lib.to_json(small_config()).replace('"seed": 0', '"seed": null', 1)
    with pytest.raises(config_lib.ConfigError, match=r"seed None must be of type int"):
        config_lib.from_json(text)
    with pytest.raises(config_lib.ConfigError, match="nested too deep"):
        config_lib.from_json("[" * 100_000)


def test_a_study_of_the_first_optimizers_may_set_the_fields_of_both():
    validation.validate(small_config(**{"optim.rms_decay": 0.5, "optim.rms_epsilon": 0.1}))
