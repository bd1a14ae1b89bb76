"""The experiment's configuration: every field, its default and its unit.

A config file is a difference to `base()`:

    config = base()
    config.model.name = "se_resnext50_32x4d"
    config.train.epochs = 90.0
"""

import difflib
import json
from collections.abc import Container
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections
from ml_collections.config_dict import placeholder

from resflax.errors import UserError
from resflax.models import create_model, override_names

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


class ConfigError(UserError):
    """The configuration asks for what cannot be; the message says what would be right."""


def base() -> ml_collections.ConfigDict:
    """Every field with its default, its type and its unit; no other can be set."""
    config = ml_collections.ConfigDict()
    config.deterministic = False  # on GPUs, use only kernels that always give the same bits
    config.seed = 0  # of the parameters, the order of the images and every random number
    config.init_from = (
        ""  # a run's directory, or weights of torchvision, timm (.safetensors) or Keras (.h5)
    )

    config.model = _model()
    config.data = _data()
    config.augment = _augment()
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
    return config.lock()


def _model() -> ml_collections.ConfigDict:
    """The network: `name`, changed by the fields that are not None (see resflax.models.resnet)."""
    model = ml_collections.ConfigDict()
    model.name = "cifar_resnet20"  # of resflax.list_models()
    model.depth = placeholder(int)  # layers with weights
    model.block = placeholder(str)  # basic | bottleneck, where the depth leaves a choice
    model.num_filters = placeholder(int)  # channels of the first stage
    model.stem_filters = placeholder(int)  # channels of the stem
    model.stem = placeholder(str)  # imagenet | cifar | deep
    model.stem_pool = placeholder(str)  # symmetric | ceil | zeros: padding of the stem's pool
    model.any_size = placeholder(bool)  # whether images of sizes unusual for the stem are meant
    model.cardinality = placeholder(int)  # groups of the 3x3 convolutions
    model.base_width = placeholder(int)  # channels of a group, at 64 filters
    model.stride_in = placeholder(str)  # 1x1 | 3x3
    model.downsample = placeholder(str)  # first | last: the block of a stage that halves the image
    model.form = placeholder(str)  # a | b | c: the equal forms of a ResNeXt block
    model.shortcut = placeholder(str)  # A | B | C | none
    model.unit = placeholder(str)  # original | full_preact | the other ones of Identity Mappings
    model.first_act = placeholder(str)  # stem | block: where the first unit's activation stands
    model.skip = placeholder(str)  # identity | constant_scaling | the other ones of its Table 1
    model.skip_scale = placeholder(float)  # of the shortcut, with constant_scaling
    model.residual_scale = placeholder(float)  # of the branch, with constant_scaling
    model.gate_bias = placeholder(float)  # initial, with exclusive_gating and shortcut_gating
    model.drop_path = placeholder(float)  # probability that the last branch is left out
    model.drop_path_mode = placeholder(str)  # batch (one draw, as published) | sample
    model.act = placeholder(str)  # relu | sigmoid | tanh | leaky_relu | silu
    model.norm = placeholder(str)  # batch | group | none
    model.conv_bias = placeholder(str)  # none | all | unnormed: convolutions with biases
    model.kernel_init = placeholder(str)  # he_fan_out | he_fan_in | glorot | lecun | gaussian
    model.se_reduction = placeholder(int)  # channels per hidden unit of the gates; 0: no gates
    model.se_squeeze = placeholder(str)  # avg | max | none
    model.se_gate = placeholder(str)  # sigmoid | tanh | relu
    model.se_bias = placeholder(bool)  # of the gates' dense layers
    model.se_divisor = placeholder(int)  # what the gates' hidden units are a multiple of
    model.se_stages = placeholder(tuple)  # stages with gates, of 2 to 5
    model.se_integration = placeholder(str)  # standard | pre | post | identity | 3x3
    model.zero_init_last = placeholder(bool)  # residual branches start as zero
    model.growth_rate = placeholder(int)  # channels that a layer of a DenseNet adds
    model.compression = placeholder(float)  # channels that its transitions keep, as a share
    model.norm_scale = placeholder(bool)  # whether an Inception net's norms have a scale
    model.dropout = placeholder(float)  # rate before the classifier
    model.aux_heads = placeholder(bool)  # auxiliary classifiers of an Inception net
    model.scan = placeholder(int)  # equal blocks in a row from which on they are a loop; 0: never
    model.remat = placeholder(bool)  # compute blocks twice, for less memory
    model.bn_momentum = placeholder(float)  # share of the running statistics that a step keeps
    model.bn_epsilon = placeholder(float)  # added to the variance
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


def _optim() -> ml_collections.ConfigDict:
    """How the parameters are changed (see resflax.optimizers)."""
    optim = ml_collections.ConfigDict()
    optim.name = "sgd"  # sgd | rmsprop
    optim.lr = 0.1  # peak learning rate per 256 images of a batch
    optim.schedule = "cosine"  # to zero | step | exponential
    optim.warmup_epochs = 0.0  # epochs of linear growth from zero
    optim.step_epochs = ()  # epochs after which 'step' multiplies the rate by step_factor
    optim.decay_epochs = 2.0  # epochs after each of which 'exponential' does
    optim.step_factor = 0.1
    optim.momentum = 0.9
    optim.rms_decay = 0.9  # share of the mean square of the gradient that a step keeps
    optim.rms_epsilon = 1.0  # added to it
    optim.nesterov = True  # or plain momentum
    optim.weight_decay = 1e-4  # coupled L2: added to the gradient
    optim.decay_norm_and_bias = True  # decay these too, as the papers' code does
    optim.clip_norm = 0.0  # largest global norm of the gradient; 0: no limit
    return optim


def model_overrides(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The arguments of `create_model` that `config.model` sets."""
    other = ("name", "bn_axis", "dtype")
    fields = {k: v for k, v in config.model.items() if v is not None and k not in other}
    return fields | {"dtype": jnp.dtype(config.model.dtype)}


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
    overrides = model_overrides(config)
    if config.train.trainable != ".*" and "scan" in override_names(config.model.name):
        overrides["scan"] = 0  # the blocks of a loop are trained all or none
    if config.model.bn_axis == "global" and "axis_name" in override_names(config.model.name):
        overrides["axis_name"] = axis_name
    return create_model(config.model.name, num_classes, **overrides)


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as JSON text."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """A config from the text that `to_json` gave; data, never executed.

    Raises:
      ConfigError: if the text is no such thing.
    """
    config = base()
    try:
        for field, value in flatten(json.loads(text)).items():
            owner, name = _owner(config, field)
            owner[name] = tuple(value) if isinstance(value, list) else value
        require_whole(config)
    except RecursionError:
        raise ConfigError("not a config of resflax: it is nested too deep.") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"not a config of resflax: {error}") from None
    return config


def require_whole(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError unless the config has the fields of `base()`, no others, of their types.

    A field that is None in `base()` may be None.
    """
    usual, found = base(), flatten(config)
    expected = flatten(usual)
    for field in sorted(found.keys() | expected.keys()):
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
    if name not in config:
        raise KeyError(field)
    return config, name
