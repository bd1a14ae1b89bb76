"""The parts of a run that its config describes: batches, state and step, over the devices."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import optax

from resflax import metrics, optimizers, steps, transfer
from resflax.data import augmentation, mixing, pipeline, resident, sources
from resflax.errors import UserError
from resflax.parallel import DataParallel
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
    schedule: optax.Schedule,
    parallel: DataParallel,
    tx: optax.GradientTransformation | None = None,
) -> TrainState:
    """The state before the first step, on the devices.

    Args:
      config: of the run.
      model: its network.
      dataset: tells the shape of the images.
      schedule: of the learning rate.
      parallel: lays it over the devices.
      tx: an optimizer of the user's own; None: the config's.
    """
    trainable, apply_fn = None, None
    if config.train.trainable != ".*":
        trainable = functools.partial(transfer.trainable, pattern=config.train.trainable)
        apply_fn = transfer.freeze(model.apply, config.train.trainable)

    if tx is None:
        tx = optimizers.optimizer(config.optim, schedule, trainable)
    elif trainable is not None:
        tx = optax.partition({True: tx, False: optax.set_to_zero()}, trainable)

    init = functools.partial(
        create_train_state,
        model,
        tx,
        dataset.description.image_shape,
        apply_fn=apply_fn,
        ema=config.train.ema_decay > 0,
    )
    return parallel.create(init, config.seed)


def train_step(
    config: ml_collections.ConfigDict,
    dataset: sources.Dataset,
    parallel: DataParallel,
    count: int = 1,
    *,
    on_devices: bool = False,
    loss: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The training step, or a call of `count` steps, over the devices; compiled when called.

    Args:
      config: of the run.
      dataset: tells what it needs of the images.
      parallel: lays it over the devices.
      count: steps in a call.
      on_devices: whether it takes indices, and then the examples: see training_data.
      loss: of the user's own, see steps.train_step; None: cross-entropy with label smoothing.
    """
    normalize = augmentation.normalizer(dataset.description.mean, dataset.description.std)
    smoothing = config.train.label_smoothing
    cross_entropy = functools.partial(metrics.cross_entropy, label_smoothing=smoothing)
    step: Callable[..., Any] = functools.partial(
        steps.train_step,
        axis_name=parallel.axis_name,
        augment=augmentation.augmenter(normalize, **config.augment),
        mix=_mixer(config, dataset.description.num_classes),
        loss=loss or cross_entropy,
        aux_weight=config.train.aux_weight if config.model.get("aux_heads") else 0.0,
        ema_decay=config.train.ema_decay,
        accumulation=config.train.grad_accumulation,
    )
    if on_devices:
        step = resident.gathering(step)
    compiled = functools.partial(parallel.step, donate_state=True, num_replicated=int(on_devices))
    if count == 1:
        return compiled(step)
    return compiled(functools.partial(steps.train_steps, step=step), batch_axis=1)


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
