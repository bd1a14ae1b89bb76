"""The parts of a run that its config describes: batches, state and step, over the devices."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import optax

from resflax import losses, optimizers, steps, transfer
from resflax.data import augmentation, mixing, pipeline, resident, sources
from resflax.errors import UserError
from resflax.parallel import DataParallel
from resflax.parts import NONE, Parts
from resflax.run.calendar import Calendar
from resflax.train_state import TrainState, create_train_state


def training_data(
    config: ml_collections.ConfigDict, dataset: sources.Dataset, parallel: DataParallel
) -> tuple[pipeline.TrainBatches, list[Any]]:
    """The batches; and the examples, in a list, where they live on the devices.

    Args:
      config: of the run.
      dataset: of the examples.
      parallel: lays them over the devices.

    Raises:
      UserError: if there are too few, or cannot live where the config wants them.
    """
    on_devices = resident.wanted(config.data.placement, dataset.train)
    batches = pipeline.TrainBatches(
        len(dataset.train),
        batch_size=config.train.batch_size,
        seed=config.seed,
        read=resident.read if on_devices else dataset.train.train_batch,
        put=parallel.put,
        threads=0 if on_devices else dataset.threads,
    )
    return batches, [parallel.replicate(resident.arrays(dataset.train))] if on_devices else []


def create_state(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    dataset: sources.Dataset,
    optimizer: optax.GradientTransformation,
    parallel: DataParallel,
    *,
    packed: bool = True,
) -> TrainState:
    """The state before the first step, on the devices.

    Args:
      config: of the run; `config.train.trainable` holds for every optimizer.
      model: its network.
      dataset: tells the shape of the images.
      optimizer: of all parameters: see optimizers.optimizer.
      parallel: lays it over the devices.
      packed: False if the optimizer is not the config's, and looks at a layer's norm or name: see
        create_train_state.
    """
    apply_fn = None
    if config.train.trainable != ".*":
        trainable = functools.partial(transfer.trainable, pattern=config.train.trainable)
        optimizer = optimizers.restricted(optimizer, trainable)
        apply_fn = transfer.freeze(model.apply, config.train.trainable)

    init = functools.partial(
        create_train_state,
        model,
        optimizer,
        dataset.description.image_shape,
        apply_fn=apply_fn,
        ema=config.train.ema_decay > 0,
        packed=packed and optimizers.is_elementwise(config.optim),
    )
    return parallel.create(init, config.seed)


def optimizer(
    config: ml_collections.ConfigDict, schedule: optax.Schedule, parts: Parts = NONE
) -> optax.GradientTransformation:
    """The optimizer that the config names, or the user's own."""
    own = parts.build_optimizer(config, schedule)
    return own or optimizers.optimizer(config.optim, schedule)


def loss(
    config: ml_collections.ConfigDict,
    dataset: sources.Dataset,
    parallel: DataParallel,
    parts: Parts = NONE,
) -> losses.Loss | losses.Distillation:
    """The loss that the config names, or the user's own; its arrays on the devices.

    Args:
      config: of the run.
      dataset: whose images and classes a teacher must know.
      parallel: lays the teacher's weights over the devices.
      parts: of the user's own.

    Raises:
      UserError: if a teacher's weights cannot be read, or do not fit the data set.
    """
    made = parts.build_loss(config) or losses.of(
        config.loss,
        label_smoothing=config.train.label_smoothing,
        load_teacher=functools.partial(transfer.teacher, dataset.description),
    )
    return parallel.replicate(made) if losses.has_arrays(made) else made


def train_step(
    config: ml_collections.ConfigDict,
    dataset: sources.Dataset,
    parallel: DataParallel,
    loss: losses.Loss | losses.Distillation,
    count: int = 1,
    *,
    on_devices: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The training step, or a call of `count` steps, over the devices; compiled when called.

    Args:
      config: of the run.
      dataset: tells what it needs of the images.
      parallel: lays it over the devices.
      loss: see steps.train_step; its arrays, if it has any, are on the devices.
      count: steps in a call.
      on_devices: whether it takes indices, and then the examples: see training_data.
    """
    normalize = augmentation.normalizer(dataset.description.mean, dataset.description.std)
    step: Callable[..., Any] = functools.partial(
        steps.train_step,
        axis_name=parallel.axis_name,
        augment=augmentation.augmenter(normalize, augmentation.Augmentation(**config.augment)),
        mix=_mixer(config, dataset.description.num_classes),
        loss=loss,
        sam_rho=config.optim.sam_rho,
        aux_weight=config.train.aux_weight if config.model.get("aux_heads") else 0.0,
        ema_decay=config.train.ema_decay,
        accumulation=config.train.grad_accumulation,
    )
    has_arrays = losses.has_arrays(loss)
    if has_arrays:
        step = _with_loss(step)
    if on_devices:
        step = resident.gathering(step)
    over = functools.partial(
        parallel.step, donate_state=True, num_replicated=on_devices + has_arrays
    )
    if count == 1:
        compiled = over(step)
    else:
        compiled = over(functools.partial(steps.train_steps, step=step), batch_axis=1)
    if not has_arrays:
        return compiled
    return lambda state, batch, *examples: compiled(state, batch, *examples, loss)


def _with_loss(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step from a state, a batch and the loss, whose arrays are then arguments when compiled."""
    return lambda state, batch, loss: step(state, batch, loss=loss)


def calendar(
    config: ml_collections.ConfigDict, steps_per_epoch: int, *, on_devices: bool
) -> Calendar:
    """The steps of a run: see steps_per_call for the arguments and errors."""
    total_steps = max(1, round(config.train.epochs * steps_per_epoch))
    return Calendar(
        total_steps,
        steps_per_epoch,
        steps_per_call(config, steps_per_epoch, total_steps, on_devices=on_devices),
        config.eval.every_epochs,
        config.checkpoint.every_epochs,
    )


def steps_per_call(
    config: ml_collections.ConfigDict, steps_per_epoch: int, total_steps: int, *, on_devices: bool
) -> int:
    """How many steps a dispatch takes: `config.train.steps_per_call`, or, where it is 0, a choice.

    An accelerator that has the data set itself gets many steps at once: those networks are small,
    and a step of theirs is shorter than its dispatch. A processor's is not.

    Args:
      config: of the run.
      steps_per_epoch: of its data.
      total_steps: of the whole run.
      on_devices: whether the examples live on the devices.

    Raises:
      UserError: if none could be as long as the config says.
    """
    every_epochs = min(config.eval.every_epochs, config.checkpoint.every_epochs)
    most = min(every_epochs * steps_per_epoch, total_steps)
    given: int = config.train.steps_per_call
    if given > most:
        raise UserError(
            f"config.train.steps_per_call {given} is more than the {most} steps until an "
            "evaluation or a checkpoint."
        )
    if given:
        return given
    if not on_devices or jax.default_backend() == "cpu":
        return 1
    return fewest_dispatches(most)


def fewest_dispatches(steps: int) -> int:
    """The number of steps, up to 32, in which so many take fewest calls, the rest one by one."""
    return min(range(1, min(steps, 32) + 1), key=lambda n: steps // n + steps % n)


def _mixer(config: ml_collections.ConfigDict, num_classes: int) -> Callable[..., Any] | None:
    if not any(config.mix.values()):
        return None
    mix = mixing.mixer(**config.mix)
    return lambda key, images, labels: mix(key, images, jax.nn.one_hot(labels, num_classes))
