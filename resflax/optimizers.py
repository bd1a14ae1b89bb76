"""Learning-rate schedules and optimizers, from the config's units to steps."""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import optax

from resflax.errors import UserError


def learning_rate(config: ml_collections.ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate by step.

    Args:
      config: of the run. The peak is `optim.lr` per 256 images of a batch (Goyal 2017, arXiv
        1706.02677), reached linearly from zero in `optim.warmup_epochs`.
      steps_per_epoch: steps in an epoch.

    Raises:
      UserError: if there are more steps than are counted in 32 bits.
    """
    epochs, batch_size, config = config.train.epochs, config.train.batch_size, config.optim
    peak = config.lr * batch_size / 256
    warmup = round(config.warmup_epochs * steps_per_epoch)
    total = round(epochs * steps_per_epoch)
    if total >= 2**31:
        raise UserError(f"config.train.epochs {epochs} are {total:,} steps, more than 2**31 - 1.")
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, max(1, total - warmup))
    elif config.schedule == "exponential":
        steps = max(1, round(config.decay_epochs * steps_per_epoch))
        decay = optax.exponential_decay(peak, steps, config.step_factor, staircase=True)
    else:
        drops = {
            round(e * steps_per_epoch) - warmup: config.step_factor for e in config.step_epochs
        }
        decay = optax.piecewise_constant_schedule(peak, drops)
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def on_processor(schedule: optax.Schedule) -> Callable[[int], float]:
    """A schedule's rates as numbers, to be logged, from a processor where there is one.

    On an accelerator each would be a program of its own between the steps'.

    Args:
      schedule: of the learning rate.
    """
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names accelerators alone
        device = jax.local_devices()[0]
    compiled = jax.jit(schedule)

    def rate(step: int) -> float:
        with jax.default_device(device):
            return float(compiled(step))

    return rate


def optimizer(
    config: ml_collections.ConfigDict,
    schedule: optax.Schedule,
    trainable: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """SGD or RMSProp with momentum and coupled L2, as the papers of these networks train them.

    RMSProp's epsilon stands beside the mean square, under the root, as in TensorFlow. The decay is
    added to the (clipped) gradient before the momentum; decoupled decay, after it, would be another
    regulariser.

    Args:
      config: `config.optim`.
      schedule: of the learning rate.
      trainable: from parameters to a tree of booleans; those that are False stay as they are, and
        do not count for the gradient's norm. None: all are trained.
    """
    mask = None if config.decay_norm_and_bias else _kernels
    if config.name == "sgd":
        descent = optax.sgd(schedule, config.momentum or None, config.nesterov)
    else:
        descent = optax.rmsprop(
            schedule,
            config.rms_decay,
            config.rms_epsilon,
            initial_scale=1.0,
            momentum=config.momentum or None,
            nesterov=config.nesterov,
        )
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.add_decayed_weights(config.weight_decay, mask),
        descent,
    )
    if trainable is None:
        return chain
    return optax.partition({True: chain, False: optax.set_to_zero()}, trainable)


def _kernels(params: Any) -> Any:
    """Marks what is a kernel: not a norm's scale, not a bias."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
