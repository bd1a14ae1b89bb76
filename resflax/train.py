"""Training, from a config to a trained network: the page to read first."""

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import ml_collections
import optax

from resflax import checkpoint, interruption, optimizers, steps, transfer
from resflax import config as config_lib
from resflax import workdir as workdir_lib
from resflax.console import Console
from resflax.data import augmentation, pipeline, sources
from resflax.evaluate import evaluator
from resflax.models import count
from resflax.parallel import DataParallel
from resflax.progress import Progress
from resflax.train_state import TrainState, create_train_state
from resflax.writers import MetricWriter


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> dict[str, float]:
    """Trains the network that `config` describes, or goes on where `workdir` stopped.

    Args:
      config: see resflax.config; validated here, before anything is written.
      workdir: the run's directory, absolute; the same one resumes.

    Returns:
      'eval/loss' (nats), 'eval/top1' and 'eval/top5' (fractions) after the last step, 'best/top1'
      and 'best/step', and 'seconds' spent here.

    Raises:
      ValueError: if the config, the data or the directory cannot be; nothing was overwritten.
      NonFiniteError: if the loss or gradient is not finite; the last good checkpoint is kept.
    """
    start = time.monotonic()
    config_lib.validate(config, jax.device_count())
    parallel = DataParallel.over(config.parallel.mode)
    dataset = sources.load(config.data)
    batches = pipeline.TrainBatches(
        dataset.train, batch_size=config.train.batch_size, seed=config.seed, put=parallel.put
    )
    total_steps = max(1, round(config.train.epochs * batches.steps_per_epoch))
    config_lib.validate_steps(config, batches.steps_per_epoch, total_steps)
    is_main = jax.process_index() == 0
    if is_main:
        workdir_lib.open_run(workdir, config)
        workdir_lib.write_description(workdir, dataset.description)
    console = Console(active=is_main)
    _introduce(console, config, dataset, parallel, workdir)
    num_classes = dataset.description.num_classes
    model = config_lib.build_model(config, num_classes, parallel.axis_name)
    schedule = optimizers.learning_rate(config, batches.steps_per_epoch)
    state = _create_state(config, model, dataset, schedule, parallel)
    train_step = {
        n: _train_step(config, dataset, parallel, n) for n in {1, config.train.steps_per_call}
    }
    evaluate = evaluator(state.apply_fn, dataset, config.eval.batch_size, parallel)

    with contextlib.ExitStack() as stack:
        stop_if_asked = stack.enter_context(interruption.deferred())
        # Order of restore: the run's own latest state, then the weights of `init_from`, then none.
        checkpointer = checkpoint.Checkpointer(workdir, config.checkpoint.keep)
        stack.callback(checkpointer.close)
        restored = checkpointer.restore_latest(parallel.single(state), parallel.replicated)
        if restored is not None:
            state, position = parallel.spread(restored[0]), restored[1]
            batches.seek(position)
        elif config.init_from:
            state = parallel.spread(transfer.start(parallel.single(state), config, num_classes))
        step = first_step = int(parallel.single(state).step)
        if first_step:
            console.print(f"resumed after step {first_step} of {total_steps}")

        writer = stack.enter_context(MetricWriter(workdir, first_step)) if is_main else None
        progress = Progress(
            console,
            writer,
            schedule,
            total_steps=total_steps,
            steps_per_epoch=batches.steps_per_epoch,
            batch_size=config.train.batch_size,
            every_steps=config.log.every_steps,
        )
        stack.enter_context(console.bar(first_step, total_steps))

        results = None
        best = checkpointer.best or (0, -1.0)
        metrics: dict[str, jax.Array] | None = None
        for count, batch in batches.take(_calls(config, step, total_steps, batches)):
            stop_if_asked()
            last_metrics = metrics
            state, metrics = train_step[count](state, batch)
            # The host reads the last call's metrics while the devices work on this one.
            if last_metrics is not None:
                progress.steps(step, parallel.fetch(last_metrics))
            step += count
            saves = _due(step, config.checkpoint.every_epochs, batches, total_steps)
            if not saves and not _due(step, config.eval.every_epochs, batches, total_steps):
                continue
            # Before a state is saved, its own loss must have been seen to be finite.
            progress.steps(step, parallel.fetch(metrics))
            metrics = None
            results = evaluate(state.eval_variables)
            is_best = results["top1"] > best[1]
            if is_best:
                best = step, results["top1"]
            progress.evaluation(step, results, is_best)
            if saves or is_best:
                checkpointer.save(parallel.single(state), batches.position, results)

        if results is None:  # there was no step left to do
            results = evaluate(state.eval_variables)

    result = _result(results, best, time.monotonic() - start)
    if is_main:
        workdir_lib.write_result(workdir, result)
    _conclude(console, workdir, result, best[0] / batches.steps_per_epoch)
    return result


def _result(results: dict[str, float], best: tuple[int, float], seconds: float) -> dict[str, float]:
    metrics = {f"eval/{name}": value for name, value in results.items()}
    return metrics | {"best/step": best[0], "best/top1": best[1], "seconds": seconds}


def _due(step: int, every_epochs: int, batches: pipeline.TrainBatches, total_steps: int) -> bool:
    return step % (every_epochs * batches.steps_per_epoch) == 0 or step == total_steps


def _calls(
    config: ml_collections.ConfigDict,
    first_step: int,
    total_steps: int,
    batches: pipeline.TrainBatches,
) -> Iterator[int]:
    """How many steps each dispatch takes.

    `steps_per_call`; where an evaluation, a checkpoint or the end is nearer than that, one: so
    there are two programs to compile, whatever the lengths of epochs and runs.
    """
    every_epochs = (config.eval.every_epochs, config.checkpoint.every_epochs)
    intervals = [epochs * batches.steps_per_epoch for epochs in every_epochs]
    step = first_step
    while step < total_steps:
        left = [steps - step % steps for steps in intervals]
        fits = config.train.steps_per_call <= min(*left, total_steps - step)
        count = config.train.steps_per_call if fits else 1
        yield count
        step += count


def _create_state(
    config: ml_collections.ConfigDict,
    model: nn.Module,
    dataset: sources.Dataset,
    schedule: optax.Schedule,
    parallel: DataParallel,
) -> TrainState:
    trainable, apply_fn = None, None
    if config.train.trainable != ".*":
        trainable = functools.partial(transfer.trainable, pattern=config.train.trainable)
        apply_fn = transfer.freeze(model.apply, config.train.trainable)
    init = functools.partial(
        create_train_state,
        model,
        optimizers.optimizer(config.optim, schedule, trainable),
        dataset.description.image_shape,
        apply_fn=apply_fn,
        seed=config.seed,
        ema=config.train.ema_decay > 0,
    )
    return parallel.create(init)


def _train_step(
    config: ml_collections.ConfigDict,
    dataset: sources.Dataset,
    parallel: DataParallel,
    count: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The training step, or a call of `count` steps, over the devices; compiled when called."""
    normalize = augmentation.normalizer(dataset.description.mean, dataset.description.std)
    step = functools.partial(
        steps.train_step,
        axis_name=parallel.axis_name,
        augment=augmentation.augmenter(normalize, **config.augment),
        label_smoothing=config.train.label_smoothing,
        aux_weight=config.train.aux_weight if config.model.aux_heads else 0.0,
        ema_decay=config.train.ema_decay,
    )
    if count == 1:
        return parallel.step(step, donate_state=True)
    call = functools.partial(steps.train_steps, step=step)
    return parallel.step(call, donate_state=True, batch_axis=1)


def _introduce(
    console: Console,
    config: ml_collections.ConfigDict,
    dataset: sources.Dataset,
    parallel: DataParallel,
    workdir: pathlib.Path,
) -> None:
    description = dataset.description
    model = config_lib.build_model(config, description.num_classes)
    changes = ", ".join(f"{k} {v}" for k, v in config_lib.model_overrides(config).items())
    console.print(f"{config.model.name} with {changes}")
    console.network(count(model, description.image_shape))
    console.print(
        f"{description.name}: {len(dataset.train):,} training and {len(dataset.test):,} test "
        f"images, {' x '.join(map(str, description.image_shape))}, {description.num_classes} labels"
    )
    console.print(
        f"{config.train.epochs:g} epochs, batches of {config.train.batch_size}, "
        f"{parallel.num_devices} x {jax.devices()[0].device_kind} ({parallel.mode})"
    )
    console.print(f"workdir: {workdir}\n")


def _conclude(
    console: Console, workdir: pathlib.Path, result: dict[str, float], best_epoch: float
) -> None:
    console.print(
        f"\ntop-1 {result['eval/top1']:.2%} after the last step; best {result['best/top1']:.2%} "
        f"(step {result['best/step']}, epoch {best_epoch:g}); {result['seconds']:.0f} s in all",
        style="bold",
    )
    console.print(
        f"{workdir}: {workdir_lib.CONFIG}, {workdir_lib.RESULT}, {workdir_lib.METRICS}, "
        f"{workdir_lib.CURVES}, {workdir_lib.CHECKPOINTS}/, {workdir_lib.EVENTS}/\n"
        f"To restore it:\n"
        f"  import resflax\n"
        f'  run = resflax.restore("{workdir}")  # best=True: the best step\n'
        f"  logits = run.model.apply(run.variables, run.preprocess(images), train=False)"
    )
