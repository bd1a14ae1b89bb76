"""One step of training and one of evaluation: pure functions of a state and a batch.

A batch is {'image': uint8 [N, H, W, C], 'label': int32 [N]}; to be evaluated it has a 'mask' too,
float32 [N]. The same step serves one device and, with an `axis_name`, each of many that hold a part
of the batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from resflax import metrics
from resflax.train_state import TrainState

Batch = dict[str, jax.Array]
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    axis_name: str | None,
    augment: Callable[[jax.Array, jax.Array], jax.Array],
    mix: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    loss: Loss = metrics.cross_entropy,
    aux_weight: float = 0.0,
    ema_decay: float = 0.0,
    accumulation: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Updates the parameters and the running statistics once.

    Args:
      state: before the step.
      batch: this device's examples.
      axis_name: the mapped axis over which gradients are averaged; None under plain jit, where
        the batch is the whole one.
      augment: from keys [N] and uint8 images to normalised float images.
      mix: from a key, this device's augmented images and their labels [N] to images and what is
        to be learned of them, probabilities [N, K]; None: they stay apart.
      loss: of each example: from logits [N, K] and `targets`, classes [N] or what `mix` makes of
        them, to [N].
      aux_weight: of the loss of each auxiliary classifier, where the network has any.
      ema_decay: share of the old average that a step keeps, where `state.ema` is kept.
      accumulation: parts of this device's examples that are computed one after another, each in
        the memory of the last; what they give is averaged, before one update. Batch norm sees a
        part at a time, as if each part were on a device of its own.

    Returns:
      The state after the step, and 'loss' (nats), 'top1' (a fraction), 'grad_norm', means over
      the whole batch; 'layer_norms', [L], the gradient's for each leaf of the parameters; and
      'skipped', how many updates were skipped so far. An update is where the loss or the gradient
      is not finite: only the step, and that count, go on.
    """
    key = jax.random.fold_in(state.key, state.step)
    augment_key, dropout_key, mix_key = jax.random.split(key, 3)
    images = augment(_example_keys(augment_key, batch["image"].shape[0], axis_name), batch["image"])
    if axis_name is not None:
        own = functools.partial(jax.random.fold_in, data=lax.axis_index(axis_name))
        mix_key, dropout_key = own(mix_key), own(dropout_key)
    targets = batch["label"]
    if mix is not None:
        images, targets = mix(mix_key, images, targets)

    gradients = functools.partial(_gradients, state, loss=loss, aux_weight=aux_weight)
    if accumulation == 1:
        means = gradients(images, targets, batch["label"], dropout_key)
    else:
        parts = _interleaved((images, targets, batch["label"]), accumulation)
        means = _mean(gradients, *parts, jax.random.split(dropout_key, accumulation))
    grads, changes, mean_loss, top1 = means if axis_name is None else lax.pmean(means, axis_name)
    # Running statistics too: a checkpoint, and the evaluation, have one set for all devices.
    batch_stats = jax.tree.map(jnp.add, state.batch_stats, changes)

    updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = {
        "params": params,
        "batch_stats": batch_stats,
        "opt_state": opt_state,
        "ema": _averages(state, params, batch_stats, ema_decay),
    }
    squares = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)])
    grad_norm = jnp.sqrt(jnp.sum(squares))
    # The gradient too: it spoils the parameters one step before the loss shows it.
    finite = jnp.isfinite(mean_loss) & jnp.isfinite(grad_norm)
    old = {name: getattr(state, name) for name in new}
    kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    state = state.replace(step=state.step + 1, skipped=state.skipped + ~finite, **kept)
    return state, {
        "loss": mean_loss,
        "top1": top1,
        "grad_norm": grad_norm,
        "layer_norms": jnp.sqrt(squares),
        "skipped": state.skipped,
    }


def _averages(state: TrainState, params: Any, batch_stats: Any, ema_decay: float) -> Any:
    """The moving averages after a step that gave these variables, if the state has any."""
    if state.ema is None:
        return None
    # The average of few steps is short, so that it forgets the initial values (as in TF).
    decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
    new = {"params": params, "batch_stats": batch_stats}
    return optax.incremental_update(new, state.ema, 1.0 - decay)


def _gradients(
    state: TrainState,
    images: jax.Array,
    targets: jax.Array,
    labels: jax.Array,
    dropout_key: jax.Array,
    *,
    loss: Loss,
    aux_weight: float,
) -> tuple[Any, Any, jax.Array, jax.Array]:
    """The mean gradient of some examples, what they change of the statistics, loss and top-1.

    Changes, because averages of them leave the statistics of frozen parts what they are.
    """

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        logits, mutated = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats", "intermediates"] if aux_weight else ["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        mean = jnp.mean(loss(logits, targets))
        for aux in mutated.get("intermediates", {}).get("aux_logits", ()):
            mean += aux_weight * jnp.mean(loss(aux, targets))
        return mean, (logits, mutated.get("batch_stats", {}))

    (mean, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    changes = jax.tree.map(jnp.subtract, batch_stats, state.batch_stats)
    return grads, changes, mean, jnp.mean(metrics.in_top_k(logits, labels, 1))


def _interleaved(arrays: Any, parts: int) -> Any:
    """Splits examples [N, ...] into [parts, N / parts, ...], the i-th of every `parts` into part i.

    So that a part of a batch that is sharded has equally many examples on each device, and no
    example has to move.
    """
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0),
        arrays,
    )


def _mean(fn: Callable[..., Any], *arrays: Any) -> Any:
    """The mean of what `fn` gives for each slice of the arrays, one slice at a time."""

    def add(total: Any, slices: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, fn(*slices)), None

    shapes = jax.eval_shape(fn, *jax.tree.map(lambda x: x[0], arrays))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = lax.scan(add, zeros, arrays)
    return jax.tree.map(lambda x: x / len(arrays[0]), total)


def train_steps(
    state: TrainState,
    batches: Batch,
    *others: Any,
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Several steps in one program, for networks whose step is as short as its dispatch.

    Args:
      state: before the steps.
      batches: a batch for each step, stacked: [steps, N, ...].
      *others: what `step` takes besides, the same in all of them.
      step: `train_step` with its settings.

    Returns:
      The state after the steps, and the metrics of each: [steps].
    """
    return lax.scan(lambda state, batch: step(state, batch, *others), state, batches)


def eval_step(
    variables: Any,
    batch: Batch,
    *,
    axis_name: str | None,
    apply_fn: Callable[..., Any],
    normalize: Callable[[jax.Array], jax.Array],
) -> dict[str, jax.Array]:
    """The summed metrics of a batch (see metrics.summed) over all devices.

    Args:
      variables: 'params' and 'batch_stats'.
      batch: this device's examples; those whose mask is 0 count for nothing.
      axis_name: the mapped axis to sum over, or None.
      apply_fn: the network's `apply`.
      normalize: from uint8 to normalised float images.
    """
    logits = apply_fn(variables, normalize(batch["image"]), train=False)
    sums = metrics.summed(logits, batch["label"], batch["mask"])
    return sums if axis_name is None else lax.psum(sums, axis_name)


def _example_keys(key: jax.Array, n: int, axis_name: str | None) -> jax.Array:
    """A key for each example by its place in the whole batch, whatever the number of devices."""
    start = 0 if axis_name is None else lax.axis_index(axis_name) * n
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, start + jnp.arange(n))
