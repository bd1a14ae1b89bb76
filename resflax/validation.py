"""What makes a configuration valid: see resflax.config."""

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import ml_collections
import numpy as np

from resflax import losses, optimizers, signature
from resflax.config import (
    ConfigError,
    base,
    flatten,
    model_overrides,
    require_arguments,
    require_whole,
)
from resflax.data import augmentation, mixing, sources
from resflax.data.resident import PLACEMENTS
from resflax.errors import UserError
from resflax.models import create_model
from resflax.parallel import MODES

SCHEDULES = ("cosine", "step", "exponential")
BN_AXES = ("device", "global")
DTYPES = ("float32", "bfloat16")

_LARGEST = float(np.finfo(np.float32).max)
# Without a limit, a slip takes all memory, threads or time of a machine.
_MOST = {
    "augment.crop_padding": 2**12,
    "augment.cutout": 2**14,
    "augment.rand_augment_layers": 100,
    "data.eval_resize": 2**14,
    "data.image_size": 2**14,
    "data.threads": 2**10,
    "eval.batch_size": 2**20,
    "optim.decay_epochs": 10**6,
    "train.grad_accumulation": 2**10,
    "train.steps_per_call": 2**20,
}

# The least value of a number.
_LEAST = {
    "train.batch_size": 1,
    "train.grad_accumulation": 1,
    "eval.batch_size": 1,
    "eval.every_epochs": 1,
    "checkpoint.every_epochs": 1,
    "checkpoint.keep": 1,
    "log.every_steps": 1,
    "optim.warmup_epochs": 0,
    "optim.weight_decay": 0,
    "optim.clip_norm": 0,
    "optim.clip_adaptive": 0,
    "optim.sam_rho": 0,
    "optim.lr": 0,
    "optim.decay_epochs": 0,
    "optim.rms_epsilon": 0,
    "train.aux_weight": 0,
    "train.steps_per_call": 0,
    "train.max_skips": 0,
    "analysis.every": 0,
}
_SHARES = ("train.label_smoothing", "train.ema_decay", "optim.momentum", "optim.rms_decay")


def validate(
    config: ml_collections.ConfigDict, num_devices: int = 1, own: Collection[str] = ()
) -> None:
    """Raises ConfigError for the first thing in the config that cannot be.

    Args:
      config: of a run.
      num_devices: that will share its batches.
      own: the parts that are the user's (see resflax.parts); of 'model', `config.model` may say
        what the user likes.
    """
    require_whole(config)
    _validate_values(config)
    _choice(config, "model.dtype", DTYPES)
    if "model" not in own:
        _model(config)
    _choice(config, "model.bn_axis", BN_AXES)
    _choice(config, "optim.schedule", SCHEDULES)
    _pattern(config, "train.trainable")
    _choice(config, "parallel.mode", MODES)
    _choice(config, "checkpoint.if_unsaved", ("stop", "go_on"))
    for field, least in _LEAST.items():
        _at_least(config, field, least)
    try:
        augmentation.Augmentation(**config.augment)
        mixing.mixer(**config.mix)
    except UserError as error:
        raise ConfigError(f"config.{error}") from None
    _validate_loss(config)
    _validate_optimizer(config)
    validate_data(config)
    # All may be kept to evaluate on, but not here.
    for field in ("data.folder.val_share", *_SHARES):
        _between(config, field, 0.0, 1.0)
    _validate_epochs(config)
    _finite(flatten(config))
    _validate_devices(config, num_devices)


def _validate_values(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for a value that cannot be whatever the field means."""
    for field, value in flatten(config).items():
        numbers = not isinstance(value, tuple) or all(isinstance(v, int | float) for v in value)
        if not numbers and not field.startswith(("model.", "optim.multipliers")):
            raise ConfigError(f"config.{field} {value} must be numbers.")
        if isinstance(value, int) and abs(value) >= 2**31 and not field.endswith("seed"):
            raise ConfigError(f"config.{field} {value} must be less than 2**31.")
    for field, most in _MOST.items():
        if _get(config, field) > most:
            raise ConfigError(f"config.{field} {_get(config, field)} must be at most {most:,}.")
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"config.seed {config.seed} must be from 0 to 2**32 - 1.")


def _validate_epochs(config: ml_collections.ConfigDict) -> None:
    if not 0 < config.train.epochs <= 1e6:
        raise ConfigError(
            f"config.train.epochs {config.train.epochs} must be more than 0, at most 1,000,000."
        )
    if config.optim.warmup_epochs > config.train.epochs:
        raise ConfigError(
            f"config.optim.warmup_epochs {config.optim.warmup_epochs} is longer than "
            f"config.train.epochs {config.train.epochs}."
        )
    step_epochs = config.optim.step_epochs
    if list(step_epochs) != sorted(step_epochs) or not all(0 <= e <= 1e6 for e in step_epochs):
        raise ConfigError(
            f"config.optim.step_epochs {step_epochs} must increase, from 0 to at most 1,000,000."
        )


def _validate_loss(config: ml_collections.ConfigDict) -> None:
    _chosen(config, "loss", losses.LOSSES)
    smoothed = "label_smoothing" in signature.shared(losses.LOSSES[config.loss.name])
    if config.train.label_smoothing and not smoothed:
        raise ConfigError(
            f"config.train.label_smoothing {config.train.label_smoothing} must be 0.0: the loss "
            f"{config.loss.name!r} has none."
        )
    try:
        losses.of(config.loss, label_smoothing=0.0, load_teacher=lambda *_: (None, None))
    except UserError as error:
        raise ConfigError(f"config.loss.{config.loss.name}: {error}") from None


def _validate_optimizer(config: ml_collections.ConfigDict) -> None:
    optim = config.optim
    _chosen(config, "optim", optimizers.OPTIMIZERS)
    fields = {name: signature.shared(make) for name, make in optimizers.OPTIMIZERS.items()}
    # Studies of both may set all fields of both, as ever.
    taken = {*fields["rmsprop"]} if optim.name == "sgd" else {*fields[optim.name]}
    for field in sorted({*itertools.chain(*fields.values())} - taken):
        _unset(config, f"optim.{field}", f"the optimizer {optim.name!r} has none")
    for entry in optim.multipliers:
        _multiplier(entry)
    try:
        optimizers.optimizer(optim, lambda step: 0.0)
    except UserError as error:
        raise ConfigError(f"config.optim.{optim.name}: {error}") from None


def _chosen(
    config: ml_collections.ConfigDict, group: str, choices: Mapping[str, Callable[..., Any]]
) -> None:
    """Raises ConfigError if a group's name is no choice, or a field of another choice is set."""
    _choice(config, f"{group}.name", choices)
    for name, choice in choices.items():
        for field in signature.own(choice) if name != config[group].name else ():
            chosen = f"config.{group}.name is {config[group].name!r}"
            _unset(config, f"{group}.{name}.{field}", chosen)


def _unset(config: ml_collections.ConfigDict, field: str, reason: str) -> None:
    value, default = _get(config, field), _get(base(), field)
    if value != default:
        raise ConfigError(f"config.{field} {value!r} must be {default!r}: {reason}.")


def _multiplier(entry: Any) -> None:
    """Raises ConfigError if an entry of config.optim.multipliers cannot be."""
    message = (
        f"config.optim.multipliers: {entry!r} must be a regular expression, a factor of the rate "
        "and one of the decay, such as ('head', 10.0, 1.0)."
    )
    if not isinstance(entry, tuple) or len(entry) != 3 or not isinstance(entry[0], str):
        raise ConfigError(message)
    pattern, *factors = entry
    for factor in factors:
        if not isinstance(factor, int | float) or not 0 <= factor <= _LARGEST:
            raise ConfigError(message)
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{message} {pattern!r} is none: {error}.") from None


def _model(config: ml_collections.ConfigDict) -> None:
    try:
        require_arguments(config)
        create_model(config.model.name, **model_overrides(config))
    except ConfigError:
        raise
    except UserError as error:
        raise ConfigError(f"config.model: {error}") from None


def validate_data(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for the first thing in `config.data` that cannot be."""
    data = config.data
    _choice(config, "data.source", sources.SOURCES)
    _choice(config, "data.placement", PLACEMENTS)
    _choice(config, "data.crop", sources.CROPS)
    share = data.folder.val_share
    if not 0 <= share <= 1:
        raise ConfigError(f"config.data.folder.val_share {share} must be from 0 to 1.")
    for field in ("max_bad", "val_share", "label_noise"):
        _between(config, f"data.{field}", 0.0, 1.0)
    if not 0 < data.train_share <= 1:
        raise ConfigError(
            f"config.data.train_share {data.train_share} must be more than 0, at most 1."
        )
    for field in ("val_seed", "train_seed", "noise_seed"):
        _at_least(config, f"data.{field}", 0)
    for field in ("threads", "eval_resize"):
        _at_least(config, f"data.{field}", 0)
    for field in ("shapes.num_train", "shapes.num_test"):
        _at_least(config, f"data.{field}", 1)
    for field, most in (("crop_scale", 1.0), ("crop_ratio", math.inf), ("crop_shorter", math.inf)):
        _interval(config, f"data.{field}", most)
    try:
        size = sources.image_size(data)
    except UserError as error:
        raise ConfigError(str(error)) from None
    least = 16 if data.source == "shapes" else 8
    if size < least:
        raise ConfigError(f"config.data.image_size {size} must be at least {least}.")
    if data.test_crops not in (1, 10):
        raise ConfigError(f"config.data.test_crops {data.test_crops} must be 1 or 10.")
    if data.test_crops > 1 and data.eval_resize <= size:
        raise ConfigError(
            f"config.data.test_crops {data.test_crops} are cut from images of "
            f"config.data.eval_resize {data.eval_resize}: it must be more than their {size} pixels."
        )
    sides = {"eval_resize": data.eval_resize or size}
    if data.crop == "scale":
        sides["crop_shorter"] = data.crop_shorter[0]
    for field, side in sides.items():
        if side < size:
            raise ConfigError(
                f"config.data.{field} {data[field]} must be at least config.data.image_size "
                f"{size}: images are not smaller than what is cut from them."
            )
    if len(data.mean) != len(data.std) or min(data.std, default=1.0) <= 0:
        raise ConfigError(
            f"config.data.mean {data.mean} and config.data.std {data.std} must be a number for "
            "each channel, the latter positive, or ()."
        )
    if not 0.0 <= data.shapes.difficulty <= 1.0:
        raise ConfigError(f"data.shapes.difficulty {data.shapes.difficulty}: from 0 to 1.")
    _finite(flatten(data, "data."))


def with_data(
    config: ml_collections.ConfigDict, changes: Mapping[str, Any] | None
) -> ml_collections.ConfigDict:
    """The config with other images: some fields of its data are changed, in place, and checked.

    Args:
      config: of a run.
      changes: by fields of `config.data`, such as {'folder.path': 'DIR'}.

    Raises:
      UserError: if there is no such field, or it cannot have that value.
    """
    fields = flatten(config.data)
    for field, value in (changes or {}).items():
        if field not in fields:
            raise UserError(f"config.data has no field {field!r}; it has {', '.join(fields)}.")
        try:
            config.data.update_from_flattened_dict({field: value})
        except TypeError:
            kind = type(fields[field]).__name__
            raise UserError(f"config.data.{field} {value!r} must be of type {kind}.") from None
    validate_data(config)
    return config


def _validate_devices(config: ml_collections.ConfigDict, num_devices: int) -> None:
    for field, parts in (
        ("train.batch_size", config.train.grad_accumulation),
        ("eval.batch_size", 1),
    ):
        size, divisor = _get(config, field), num_devices * parts
        if size % divisor:
            below = max(1, size // divisor) * divisor
            times = f" x config.train.grad_accumulation {parts}" if parts > 1 else ""
            raise ConfigError(
                f"config.{field} {size} is not divisible by {num_devices} devices{times}; "
                f"{below} or {below + divisor} would be."
            )
    if config.parallel.mode == "jit" and config.model.bn_axis == "device" and num_devices > 1:
        raise ConfigError(
            f"config.parallel.mode 'jit' on {num_devices} devices has the whole batch's batch-norm "
            "statistics: set config.model.bn_axis to 'global', or the mode to 'shard_map'."
        )


def _get(config: ml_collections.ConfigDict, field: str) -> Any:
    *groups, name = field.split(".")
    for group in groups:
        config = config[group]
    return config[name]


def _finite(fields: dict[str, Any]) -> None:
    for field, value in fields.items():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, float) and not abs(part) <= _LARGEST:
                raise ConfigError(
                    f"config.{field} {value} must be finite: at most {_LARGEST:.2g}, float32's "
                    "largest number."
                )


def _choice(config: ml_collections.ConfigDict, field: str, choices: Iterable[str]) -> None:
    value = _get(config, field)
    if value not in choices:
        raise ConfigError(
            f"config.{field} {value!r} is not one of {', '.join(map(repr, choices))}."
        )


def _pattern(config: ml_collections.ConfigDict, field: str) -> None:
    try:
        re.compile(_get(config, field))
    except re.error as error:
        raise ConfigError(
            f"config.{field} {_get(config, field)!r} is no regular expression: {error}."
        ) from None


def _at_least(config: ml_collections.ConfigDict, field: str, least: float) -> None:
    value = _get(config, field)
    if not value >= least:
        raise ConfigError(f"config.{field} {value} must be at least {least}.")


def _between(config: ml_collections.ConfigDict, field: str, low: float, high: float) -> None:
    value = _get(config, field)
    if not low <= value < high:
        raise ConfigError(f"config.{field} {value} must be at least {low} and less than {high}.")


def _interval(config: ml_collections.ConfigDict, field: str, most: float) -> None:
    value = _get(config, field)
    if len(value) != 2 or not 0 < value[0] <= value[1] <= most:
        limit = "" if most == math.inf else f", at most {most}"
        raise ConfigError(
            f"config.{field} {value} must be two positive numbers, the least and the most{limit}."
        )
