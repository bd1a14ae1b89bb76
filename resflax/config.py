"""The experiment's configuration: every field, its default and its unit.

A config file is a difference to `base()`:

    config = base()
    config.model.name = "se_resnext50_32x4d"
    config.train.epochs = 90.0
"""

import difflib
import functools
import json
import types
import typing
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections
from ml_collections.config_dict import FieldReference, placeholder

from resflax import signature
from resflax.errors import UserError
from resflax.losses import LOSSES
from resflax.models import argument_types, create_model, list_models, override_names
from resflax.optimizers import OPTIMIZERS

# The fields that may differ between two starts of a run, and between a run and its checkpoints. The
# parameters after a step depend on none of them but the first, which says how many steps there are.
MAY_DIFFER = {
    "train.epochs": "a run can be made longer; its schedule follows",
    "train.steps_per_call": "the steps are the same, in other dispatches",
    "train.max_skips": "a limit, which a run that came to it may be given more of",
    "eval.batch_size": "means are over all test images",
    "eval.every_epochs": "an evaluation changes nothing",
    "checkpoint.every_epochs": "neither does a save",
    "checkpoint.keep": "the next save deletes what is too many",
    "checkpoint.if_unsaved": "what to do on a full disk, today",
    "analysis.every": "the blocks are looked at, and left alone",
    "log.every_steps": "lines of metrics name their step",
    "data.placement": "the order of the images is the same",
    "data.threads": "likewise",
    "data.max_bad": "a limit, like train.max_skips",
    "data.folder.path": "a place: what is there is compared by the data set's description",
    "data.arrays.path": "likewise",
    "data.tfds.data_dir": "likewise",
}


# Of `config.model`, what is not an argument that its network gets as it stands here; and arguments
# on which who trains decides.
_OF_MODEL = ("name", "bn_axis", "dtype")
_OF_TRAINING = ("axis_name", "packed")


class ConfigError(UserError):
    """The configuration asks for what cannot be; the message says what would be right."""


def base() -> ml_collections.ConfigDict:
    """Every field with its default, its type and its unit; no other can be set, but in `model`."""
    config = ml_collections.ConfigDict()
    config.deterministic = False  # on GPUs, use only kernels that always give the same bits
    config.seed = 0  # of the parameters, the order of the images and every random number
    config.init_from = (
        ""  # a run's directory, or weights of torchvision, timm (.safetensors) or Keras (.h5)
    )

    config.model = _model()
    config.data = _data()
    config.augment = _augment()
    config.loss = _loss()
    config.optim = _optim()

    mix = config.mix = ml_collections.ConfigDict()
    mix.mixup = 0.0  # alpha of mixup; 0: off
    mix.cutmix = 0.0  # alpha of CutMix; 0: off; with both on, each has half of the batches

    train = config.train = ml_collections.ConfigDict()
    train.batch_size = 128  # images a step, over all devices
    train.grad_accumulation = 1  # equal parts of a batch, one after another, for less memory
    train.epochs = 30.0  # passes over the training images
    train.steps_per_call = 0  # steps in one dispatch, the same results; 0: see resflax.build
    train.label_smoothing = 0.0  # probability spread over all classes
    train.aux_weight = 0.3  # of the loss of each auxiliary classifier
    train.trainable = ".*"  # regular expression that begins the paths of parameters to be trained
    train.max_skips = 0  # updates, of non-finite losses or gradients, that the whole run may skip
    train.ema_decay = 0.0  # share of the averaged parameters that a step keeps; 0: no average

    evaluate = config.eval = ml_collections.ConfigDict()
    evaluate.batch_size = 512  # images, over all devices
    evaluate.every_epochs = 1  # epochs; and at the end

    checkpoint = config.checkpoint = ml_collections.ConfigDict()
    checkpoint.every_epochs = 1  # epochs; and at the end
    checkpoint.keep = 2  # the latest ones; the best one is kept besides
    checkpoint.if_unsaved = "stop"  # stop | go_on: where a state cannot be saved, on a full disk

    config.analysis = ml_collections.ConfigDict()
    config.analysis.every = 0  # steps to a look at the blocks' signal, units and gates; 0: never

    config.log = ml_collections.ConfigDict()
    config.log.every_steps = 10  # steps to a line of metrics.jsonl

    config.parallel = ml_collections.ConfigDict()
    config.parallel.mode = "shard_map"  # shard_map | jit | pmap
    config.lock()
    config.model.unlock()
    return config


def _model() -> ml_collections.ConfigDict:
    """The network: `name`, changed by any argument of its constructor that is set here.

    The group is open: `config.model.depth = 50` sets the argument `depth` of `create_model`, and
    what is not set, or None, is as the name has it. The constructor's own annotations say which
    arguments there are, and of which types (see list_arguments), so none is listed here. A
    sub-group for them would be one more name in every flag, config file and config.json.
    """
    # Not type-safe: 1 may be followed by 0.5. What an argument can be, its constructor says.
    model = ml_collections.ConfigDict(type_safe=False)
    model.name = "cifar_resnet20"  # of resflax.list_models()
    model.bn_axis = "device"  # statistics of a device's images (the papers') | global: of all
    model.dtype = "float32"  # of the computation | bfloat16
    return model


def _data() -> ml_collections.ConfigDict:
    """The images (see resflax.data.sources)."""
    data = ml_collections.ConfigDict()
    data.source = "digits"  # digits | shapes | folder | arrays | tfds | given: dataset=...
    data.image_size = 16  # pixels, both sides; 0: a TFDS data set's usual; saved arrays keep theirs
    data.mean = ()  # of each channel, on a scale of 0 to 1; (): that of the training images
    data.std = ()  # standard deviation, likewise
    data.placement = "auto"  # device: the images live there | host | auto: device, if they fit
    data.crop = "center"  # of files: once, kept in memory | resized: Inception's | scale: He's
    data.crop_scale = (0.08, 1.0)  # of 'resized': its area, as shares of the image's
    data.crop_ratio = (3 / 4, 4 / 3)  # of 'resized': its width over its height
    data.crop_shorter = (256, 480)  # of 'scale': the image's shorter side before, pixels
    data.eval_resize = 0  # shorter side before the center is cut, pixels; 0: image_size
    data.test_crops = 1  # of a test image | 10: corners, middle, and mirrored; averaged predictions
    data.val_share = 0.0  # of each class of the training images, to choose the best state by
    data.val_seed = 0  # of which they are
    data.train_share = 1.0  # of each class of those that are left, to train on
    data.train_seed = 0  # of which they are
    data.label_noise = 0.0  # share of these that get another class, each as likely
    data.noise_seed = 0  # of which they are, and of their classes
    data.threads = 0  # that decode; 0: as many as there are cores
    data.max_bad = 0.001  # share of the files that may be unreadable
    data.shapes = ml_collections.ConfigDict()  # of the source 'shapes' only
    data.shapes.num_train = 8000  # images
    data.shapes.num_test = 1000  # images
    data.shapes.seed = 0  # of the images: another seed is another data set
    data.shapes.difficulty = 0.3  # 0: large and clean, 1: small, noisy, cluttered

    data.folder = ml_collections.ConfigDict()  # of the source 'folder' only
    data.folder.path = ""  # of train/CLASS/*.jpg and val/CLASS/*.jpg, or of CLASS/*.jpg
    data.folder.val_share = 0.2  # of the images, without val/, to be the test set; 1: all
    data.folder.seed = 0  # of which they are

    data.tfds = ml_collections.ConfigDict()  # of the source 'tfds' only
    data.tfds.name = ""  # NAME, NAME/CONFIG or NAME:VERSION
    data.tfds.data_dir = ""  # where data sets are prepared; "": $TFDS_DATA_DIR or its default
    data.tfds.train_split = ""  # "": that of the data set's defaults, or 'train'
    data.tfds.test_split = ""  # likewise, or 'test'
    data.tfds.val_split = ""  # to choose the best state by, as data.val_share; "": none

    data.arrays = ml_collections.ConfigDict()  # of the source 'arrays' only
    data.arrays.path = ""  # .npz, directory of .npy or IDX files, or the name of a prepared set
    return data


def _augment() -> ml_collections.ConfigDict:
    """What is done to training images (see resflax.data.augmentation)."""
    augment = ml_collections.ConfigDict()
    augment.crop_padding = 0  # pixels around the image before a random crop
    augment.flip = False  # half of the images mirrored
    augment.resized_scale = ()  # least and most area of a random part, as shares; (): the whole
    augment.resized_ratio = (3 / 4, 4 / 3)  # least and most ratio of its width to its height
    augment.rand_augment_layers = 0  # RandAugment's operations on an image; 0: off
    augment.rand_augment_magnitude = 9.0  # of them, 0 to 10
    augment.brightness = 0.0  # jitter: factors within this distance of 1; so the next two
    augment.contrast = 0.0
    augment.saturation = 0.0
    augment.hue = 0.0  # turn on the colour circle, to either side; 0.5 is all of it
    augment.lighting = 0.0  # standard deviation of AlexNet's noise; 0.1 in the papers
    augment.erasing = 0.0  # probability that a random rectangle is erased
    augment.erasing_area = (0.02, 0.4)  # least and most area of it, as shares
    augment.erasing_ratio = 0.3  # least ratio of its height to its width; the most is the inverse
    augment.erasing_value = 0.0  # that it is filled with, after normalisation; 0: the mean image
    augment.erasing_noise = 0.0  # standard deviation of normal numbers that are added to it
    augment.cutout = 0  # side of a square of zeros, pixels
    return augment


def _loss() -> ml_collections.ConfigDict:
    """The loss in training: `name`, and for each loss its own fields (see resflax.losses).

    An evaluation's loss is always the cross-entropy.
    """
    loss = ml_collections.ConfigDict()
    loss.name = "cross_entropy"  # cross_entropy | binary | focal | distillation
    return _with_groups(loss, LOSSES)


def _optim() -> ml_collections.ConfigDict:
    """How the parameters are changed (see resflax.optimizers)."""
    optim = ml_collections.ConfigDict()
    optim.name = "sgd"  # sgd | rmsprop | adamw | lamb | lars | lion | muon
    optim.lr = 0.1  # peak learning rate per 256 images of a batch
    optim.schedule = "cosine"  # to zero | step | exponential
    optim.warmup_epochs = 0.0  # epochs of linear growth from zero
    optim.step_epochs = ()  # epochs after which 'step' multiplies the rate by step_factor
    optim.decay_epochs = 2.0  # epochs after each of which 'exponential' does
    optim.step_factor = 0.1
    optim.momentum = 0.9  # share of the last update that a step of sgd or rmsprop keeps
    optim.rms_decay = 0.9  # share of the mean square of the gradient that a step of rmsprop keeps
    optim.rms_epsilon = 1.0  # added to it
    optim.nesterov = True  # of sgd and rmsprop, or plain momentum
    optim.weight_decay = 1e-4  # coupled L2 or decoupled: see resflax.optimizers.optimizer
    optim.decay_norm_and_bias = True  # decay these too, as the papers' code does
    optim.clip_norm = 0.0  # largest global norm of the gradient; 0: no limit
    optim.clip_adaptive = 0.0  # largest gradient of a unit, as a share of its norm; 0: no limit
    optim.sam_rho = 0.0  # distance at which SAM takes the gradient, arXiv 2010.01412; 0: no SAM
    # (regular expression, factor of the rate, factor of the decay) of parameters whose paths begin
    # with it, as for train.trainable; the first that fits counts: (("head", 10.0, 1.0),)
    optim.multipliers = ()
    return _with_groups(optim, OPTIMIZERS)


def _with_groups(
    group: ml_collections.ConfigDict, constructors: Mapping[str, Callable[..., Any]]
) -> ml_collections.ConfigDict:
    """Adds a sub-group for each constructor that has fields of its own."""
    for name, constructed in constructors.items():
        own = signature.own(constructed)
        if own:
            group[name] = ml_collections.ConfigDict()
        for field, default in own.items():
            group[name][field] = placeholder(float) if default is None else default
    return group


def model_overrides(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The arguments of `create_model` that `config.model` sets."""
    fields = {k: v for k, v in config.model.items() if v is not None and k not in _OF_MODEL}
    return fields | {"dtype": jnp.dtype(config.model.dtype)}


def list_arguments(model: ml_collections.ConfigDict, name: str) -> None:
    """Makes every argument of a network a field of its type, so that a command line can set it.

    Arguments of other networks become fields too: a sweep over names can say of one that it is
    None. `drop_unset` takes out what is left.

    Args:
      model: `config.model`.
      name: of the network.

    Raises:
      UserError: if there is no such network.
    """
    for argument, hint in (_all_types() | argument_types(name)).items():
        if argument in _OF_MODEL or argument in _OF_TRAINING:
            continue
        value, kind = model.get(argument), _kind(hint)
        if value is None or (kind is float and type(value) is int):
            with model.unlocked():
                if argument in model:  # it would be set, and keep its type
                    del model[argument]
                model[argument] = FieldReference(value, field_type=kind)


@functools.cache
def _all_types() -> dict[str, Any]:
    """The arguments of all networks, with the annotations of one that takes them."""
    networks = (argument_types(name) for name in list_models())
    return {argument: hint for types in networks for argument, hint in types.items()}


def _kind(hint: Any) -> type:
    """The type that the text of an argument is read as; object: as a literal of Python."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = typing.get_args(hint) if is_union else (hint,)
    kinds = [typing.get_origin(part) or part for part in parts]
    read = [tuple if kind is Sequence else kind for kind in kinds]
    known = [kind for kind in read if kind in (bool, int, float, str, tuple)]
    return known[0] if len(known) == 1 else object


def drop_unset(model: ml_collections.ConfigDict) -> None:
    """Takes the arguments that are None out of `config.model`."""
    with model.unlocked():
        for argument in [name for name, value in model.items() if value is None]:
            del model[argument]


def require_arguments(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError unless the network has the arguments that `config.model` sets.

    What their values can be, `create_model` says.
    """
    name = config.model.name
    known = [argument for argument in override_names(name) if argument not in _OF_TRAINING]
    for field, value in config.model.items():
        if value is None or field in _OF_MODEL or field in known:
            continue
        close = difflib.get_close_matches(field, [*_OF_MODEL, *known], n=1)
        if close and field not in _OF_TRAINING:
            raise ConfigError(f"the config has no field 'model.{field}'; did you mean {close[0]}?")
        raise ConfigError(
            f"config.model: {name} has no argument {field!r}; it has {', '.join(known)}."
        )


def build_model(
    config: ml_collections.ConfigDict,
    num_classes: int,
    axis_name: str | None = None,
) -> nn.Module:
    """The network that the config describes.

    Args:
      config: of the run.
      num_classes: of its data set.
      axis_name: the mapped axis of the devices, over which batch norm averages if it is global.
    """
    model = create_model(config.model.name, num_classes, **model_overrides(config))
    return for_training(config, model, axis_name)


def for_training(
    config: ml_collections.ConfigDict, model: nn.Module, axis_name: str | None
) -> nn.Module:
    """A network with those of its fields changed, if it has them, that who trains decides on."""
    changes: dict[str, Any] = {}
    if config.train.trainable != ".*":
        changes["scan"] = 0  # the blocks of a loop are trained all or none
    if config.model.bn_axis == "global":
        changes["axis_name"] = axis_name
    changes = {field: value for field, value in changes.items() if hasattr(model, field)}
    return model.clone(**changes) if changes else model


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as JSON text, with the arguments of the network in order."""
    fields = config.to_dict()
    model = fields["model"].items()
    fields["model"] = {name: value for name, value in sorted(model) if value is not None}
    return json.dumps(fields, indent=2) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """A config from the text that `to_json` gave; data, never executed.

    Raises:
      ConfigError: if the text is no such thing.
    """
    config = base()
    try:
        for field, value in flatten(json.loads(text)).items():
            owner, name = _owner(config, field)
            owner[name] = _tuples(value)
        drop_unset(config.model)
        require_whole(config)
    except RecursionError:
        raise ConfigError("not a config of resflax: it is nested too deep.") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"not a config of resflax: {error}") from None
    return config


def _tuples(value: Any) -> Any:
    """JSON has lists for tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def require_whole(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError unless the config has the fields of `base()`, no others, of their types.

    Arguments of the network may be there besides, as numbers, texts and tuples of them.
    """
    usual, found = base(), flatten(config)
    expected = flatten(usual)
    for field in sorted(found.keys() | expected.keys()):
        if field not in expected and field.startswith("model.") and field.count(".") == 1:
            if not _is_plain(found[field]):
                raise ConfigError(
                    f"config.{field} {found[field]!r} must be a number, a text or a tuple of them; "
                    "a constructor is an argument in a get_model() of the config file."
                )
            continue
        if field not in expected:
            close = difflib.get_close_matches(field, expected, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ConfigError(f"the config has no field {field!r}{hint}")
        if field not in found:
            raise ConfigError(f"config.{field} is missing: begin with resflax.config.base().")
        value, owner, name = found[field], *_owner(usual, field)
        kind = owner.get_type(name)
        if value is None and expected[field] is None:
            continue
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise ConfigError(f"config.{field} {value!r} must be of type {kind.__name__}.")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The fields of nested dicts by their dotted names."""
    fields: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict | ml_collections.ConfigDict):
            fields |= flatten(value, f"{prefix}{key}.")
        else:
            fields[prefix + key] = value
    return fields


def difference(
    old: ml_collections.ConfigDict, new: ml_collections.ConfigDict, but: Container[str] = ()
) -> list[str]:
    """The fields that differ, `but` some, as lines 'field: old -> new'."""
    before, after = flatten(old), flatten(new)
    return [
        f"{field}: {before.get(field)!r} -> {after.get(field)!r}"
        for field in sorted(before.keys() | after.keys())
        if before.get(field) != after.get(field) and field not in but
    ]


def _owner(config: ml_collections.ConfigDict, field: str) -> tuple[Any, str]:
    *groups, name = field.split(".")
    for group in groups:
        config = config[group]
    if name not in config and groups != ["model"]:
        raise KeyError(field)
    return config, name


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
