"""Repeats the step at which a run failed, from its last checkpoint, to look into it."""

import contextlib
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from resflax import build, checkpoint, optimizers, train, validation
from resflax import config as config_lib
from resflax.parallel import data_parallel
from resflax.parts import NONE, Parts
from resflax.process import distributed
from resflax.run import lock
from resflax.run import workdir as workdir_lib
from resflax.run.console import Console
from resflax.run.failure import FILE, Failure, FailureError


def replay(config: ml_collections.ConfigDict, workdir: pathlib.Path, parts: Parts = NONE) -> bool:
    """Trains from the last checkpoint to the step of failure.json, and prints what it gives there.

    It can be done again, with a debugger say: nothing is saved.

    Args:
      config: of the run.
      workdir: of the run, absolute.
      parts: of the user's own, as of the run.

    Returns:
      Whether the step gave the same, bit for bit.

    Raises:
      UserError: if no step of the run failed, another config is given, or the run is at work.
    """
    validation.validate(config, jax.device_count(), parts.own)
    failure = Failure.read(workdir)
    if changes := config_lib.difference(workdir_lib.read_config(workdir), config):
        raise FailureError(f"the run has another config ({'; '.join(changes)}); give its own.")
    if set(noted := workdir_lib.read_parts(workdir)) != set(parts.own):
        own = ", ".join(noted) or "none"
        raise FailureError(f"the run has other parts of the user's own ({own}); give its own.")
    parallel = data_parallel(config.parallel.mode)
    dataset = parts.load_dataset(config)
    batches, examples = build.training_data(config, dataset, parallel)
    model = parts.build_model(config, dataset.description.num_classes, parallel.axis_name)
    schedule = optimizers.learning_rate(config, batches.steps_per_epoch)
    optimizer = build.optimizer(config, schedule, parts)
    state = build.create_state(
        config, model, dataset, optimizer, parallel, packed=parts.optimizer is None
    )
    loss = build.loss(config, dataset, parallel, parts)
    console = Console(active=jax.process_index() == 0)
    with (
        lock.held(workdir, console.print, distributed.on_first),
        contextlib.closing(checkpoint.Checkpointer(workdir, config.checkpoint.keep)) as saved,
    ):
        state = train.resume(state, config, parts, dataset, saved, batches, parallel, console)
    first_step = int(parallel.single(state).step)
    if first_step >= failure.step:
        raise FailureError(
            f"the run went on: its checkpoint is of step {first_step}, after step {failure.step}."
        )
    console.print(f"from step {first_step} to step {failure.step}")
    step = build.train_step(config, dataset, parallel, loss, on_devices=bool(examples))
    metrics: dict[str, jax.Array] = {}
    for _, batch in batches.take([1] * (failure.step - first_step)):
        state, metrics = step(state, batch, *examples)
    (found,) = parallel.fetch(metrics)
    array = checkpoint.spoilt(parallel.single(state))
    for name, norm in zip(failure.layer_norms, found["layer_norms"], strict=True):
        console.print(f"{norm:12.4g}  {name}")
    if array is not None:
        console.print(f"{array} is not finite after step {failure.step}")
    same = array == failure.array and _same(found, failure)
    console.print(
        f"step {failure.step}: loss {found['loss']}, norm of the gradient {found['grad_norm']}: "
        f"{'as' if same else 'NOT as'} in {workdir / FILE}"
    )
    return same


def _same(metrics: dict[str, Any], failure: Failure) -> bool:
    """Whether a step gave the numbers of the one that failed, bit for bit."""
    return all(
        np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32), equal_nan=True)
        for a, b in (
            (metrics["loss"], failure.loss),
            (metrics["grad_norm"], failure.grad_norm),
            (metrics["layer_norms"], list(failure.layer_norms.values())),
        )
    )
