"""Training, from a config to a trained network: the page to read first."""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import optax

from resflax import build, checkpoint, optimizers, transfer, validation
from resflax import config as config_lib
from resflax.analysis import monitor
from resflax.data import pipeline, sources
from resflax.errors import UserError
from resflax.evaluate import evaluator, named, unchosen
from resflax.models import repeat
from resflax.parallel import DataParallel, data_parallel
from resflax.parts import NONE, Parts, unmapped
from resflax.process import distributed
from resflax.run import failure, interruption, lock, summary
from resflax.run import workdir as workdir_lib
from resflax.run.calendar import Calendar
from resflax.run.console import Console
from resflax.run.progress import Progress
from resflax.run.writers import Attempts, MetricWriter
from resflax.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class _Call:
    """Steps that were dispatched together, whose metrics the host has not read.

    Attributes:
      step: the last of them.
      count: of them.
      metrics: on the devices.
      waited: whether the devices had nothing to do until its data came.
    """

    step: int
    count: int
    metrics: dict[str, jax.Array]
    waited: bool

    @property
    def is_done(self) -> bool:
        """Whether the devices have computed it, so that they have nothing left to do."""
        return all(m.is_ready() for m in self.metrics.values())  # type: ignore[attr-defined]

    def tell(self, progress: Progress, parallel: DataParallel) -> None:
        """Reads the metrics, and passes them on."""
        progress.steps(self.step, parallel.fetch(self.metrics, self.count), self.waited)


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, parts: Parts = NONE
) -> dict[str, float]:
    """Trains the network that `config` describes, or goes on where `workdir` stopped.

    Args:
      config: see resflax.config; validated (resflax.validation), before anything is written.
      workdir: the run's directory, absolute; the same one resumes.
      parts: of the user's own, of which the directory keeps no more than that they were.

    Returns:
      'eval/loss' (nats), 'eval/top1' and 'eval/top5' (fractions) after the last step, 'best/top1'
      and 'best/step' (0 if no evaluation was finite), and 'seconds' spent here. These are of the
      validation images, where the data set has some; then 'test/loss' and so on are of the test
      images after the last step, and 'best/test_loss' and so on at the best one. 'eval_NAME/loss'
      and so on are of further images that the data set has by that name, after the last step.

    Raises:
      UserError: if the config, the data or the directory cannot be, or another process is at work
        in the directory; nothing was overwritten.
      NonFiniteError: if losses or gradients are not finite, more often than `train.max_skips`, or
        an update made a parameter so; no such state was saved, and failure.json has the step.
      Stopped: if a signal asked for it; the state was saved.
    """
    with contextlib.ExitStack() as held:
        return _train(config, workdir, parts, held)


def _train(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    parts: Parts,
    held: contextlib.ExitStack,
) -> dict[str, float]:
    """See train_and_evaluate; `held` has the directory until all of it is written."""
    start = time.monotonic()
    validation.validate(config, jax.device_count(), parts.own)
    distributed.require_same(config_lib.to_json(config), "config")
    parallel = data_parallel(config.parallel.mode)
    is_main = jax.process_index() == 0
    console = Console(active=is_main)
    dataset = parts.load_dataset(config, console.print)
    num_classes = dataset.description.num_classes
    model = parts.build_model(config, num_classes, parallel.axis_name)
    loss = build.loss(config, dataset, parallel, parts)
    parts.try_out(config, model, loss, dataset.description)
    batches, examples = build.training_data(config, dataset, parallel)
    calendar = build.calendar(config, batches.steps_per_epoch, on_devices=bool(examples))
    schedule = optimizers.learning_rate(config, batches.steps_per_epoch)
    optimizer = build.optimizer(config, schedule, parts)
    distributed.on_first(lambda: workdir_lib.make(workdir))
    own = held.enter_context(lock.held(workdir, console.print, distributed.on_first))
    distributed.on_first(lambda: workdir_lib.open_run(workdir, config, checkpoint.configs(workdir)))
    distributed.on_first(lambda: workdir_lib.open_parts(workdir, parts.named(model, dataset)))
    summary.introduce(console, config, model, dataset, parallel, workdir)
    state = build.create_state(
        config, model, dataset, optimizer, parallel, packed=parts.optimizer is None
    )
    train_step = {
        n: build.train_step(config, dataset, parallel, loss, n, on_devices=bool(examples))
        for n in {1, calendar.steps_per_call}
    }
    evaluate = evaluator(state.apply_fn, dataset, config.eval.batch_size, parallel)

    with contextlib.ExitStack() as stack:
        asked_to_stop = stack.enter_context(interruption.deferred(own.stopping))
        checkpointer = _checkpointer(config, workdir, dataset, console)
        stack.callback(checkpointer.close)
        # Before it waits for a save, which may wait for the other processes.
        stack.push(distributed.tell)
        # Also where too many of them stop the run.
        note_bad = _bad_files(workdir, dataset, console)
        stack.callback(note_bad)
        state = resume(state, config, parts, dataset, checkpointer, batches, parallel, console)
        step = first_step = int(parallel.single(state).step)
        distributed.on_first(lambda: _begin(workdir, config, dataset, first_step, calendar))
        if first_step:
            console.print(f"resumed after step {first_step} of {calendar.total_steps}")

        writer = None
        if is_main:
            writer = stack.enter_context(MetricWriter(workdir, first_step, console.print))
        progress = _progress(config, dataset, calendar, schedule, console, writer)
        every = config.analysis.every if is_main else 0
        look = monitor.watcher(every, unmapped(model), dataset)
        stack.push(failure.recorder(workdir, batches, parallel.single(state)))
        stack.enter_context(console.bar(first_step, calendar.total_steps))

        results = None
        best = checkpointer.best or (0, 0.0)
        pending: _Call | None = None
        for count, batch in batches.take(calendar.calls(step)):
            waited = batches.waited and pending is not None and pending.is_done
            state, metrics = train_step[count](state, batch, *examples)
            # The host reads the last call's metrics while the devices work on this one.
            if pending is not None:
                pending.tell(progress, parallel)
            step += count
            if numbers := look(step, count, functools.partial(_variables, state, parallel)):
                progress.look(step, numbers)
            pending = _Call(step, count, metrics, waited)
            stops = asked_to_stop(step) if step < calendar.total_steps else None
            saves, evaluates = calendar.saves(step), calendar.evaluates(step)
            if not (evaluates or stops):
                continue
            distributed.on_first(own.check)
            # Before a state is evaluated or saved, it must have been seen to be finite.
            pending.tell(progress, parallel)
            progress.parameters(step, checkpoint.spoilt(parallel.single(state)))
            pending, is_best = None, False
            if evaluates:
                results = evaluate(state.eval_variables, dataset.evaluated)
                is_best = checkpoint.quality(results) >= best[1]  # the latest of equals
                if is_best:
                    best = step, results["top1"]
                progress.evaluation(step, results, is_best, len(dataset.bad))
                note_bad()
            if saves or is_best or stops:
                evaluated = results if evaluates else None
                checkpointer.save(parallel.single(state), evaluated)
            if stops:
                raise interruption.Stopped(stops)

        if results is None:  # there was no step left to do
            results = evaluate(state.eval_variables, dataset.evaluated)

    further = unchosen(
        evaluate,
        dataset,
        state,
        best[0],
        lambda step: checkpoint.restore_model(workdir, step, parts=parts).variables,
        parallel,
        console.print,
    )
    chosen = {"best/step": best[0], "best/top1": best[1], "seconds": time.monotonic() - start}
    result = named("eval/", results) | chosen | further
    if is_main:
        workdir_lib.write_result(workdir, result)
    summary.conclude(console, workdir, parts, result, best[0] / batches.steps_per_epoch)
    return result


def _begin(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    dataset: sources.Dataset,
    first_step: int,
    calendar: Calendar,
) -> None:
    """Notes what this start of the run is, where all that it needs is there."""
    if first_step > calendar.total_steps:
        raise UserError(
            f"config.train.epochs {config.train.epochs:g} ends after step {calendar.total_steps}, "
            f"and the run in {workdir} is at step {first_step} already; take another --workdir."
        )
    if first_step:
        workdir_lib.require_same_data(workdir, dataset.description)
    workdir_lib.renew_config(workdir, config)
    workdir_lib.write_description(workdir, dataset.description)


def _bad_files(
    workdir: pathlib.Path, dataset: sources.Dataset, console: Console
) -> Callable[[], None]:
    """Notes the images that could not be read so far."""
    process = jax.process_index()
    write = functools.partial(workdir_lib.write_bad_files, workdir, dataset.bad, process)
    return functools.partial(Attempts(console.print), workdir / workdir_lib.BAD_FILES, write)


def _checkpointer(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    dataset: sources.Dataset,
    console: Console,
) -> checkpoint.Checkpointer:
    counts = {"num_train": len(dataset.train), "num_test": len(dataset.test)}
    counts["num_val"] = len(dataset.val or ())
    origin = checkpoint.of_run(config, dataset.description, **counts)
    return checkpoint.Checkpointer(
        workdir,
        config.checkpoint.keep,
        facts=checkpoint.facts(config_lib.to_json(config)) | origin,
        report=console.print,
        unsaved=console.print if config.checkpoint.if_unsaved == "go_on" else None,
    )


def _progress(
    config: ml_collections.ConfigDict,
    dataset: sources.Dataset,
    calendar: Calendar,
    schedule: optax.Schedule,
    console: Console,
    writer: MetricWriter | None,
) -> Progress:
    return Progress(
        console,
        writer,
        optimizers.on_processor(schedule),
        total_steps=calendar.total_steps,
        steps_per_epoch=calendar.steps_per_epoch,
        batch_size=config.train.batch_size,
        every_steps=config.log.every_steps,
        num_classes=dataset.description.num_classes,
        max_skips=config.train.max_skips,
    )


def resume(
    state: TrainState,
    config: ml_collections.ConfigDict,
    parts: Parts,
    dataset: sources.Dataset,
    checkpointer: checkpoint.Checkpointer,
    batches: pipeline.TrainBatches,
    parallel: DataParallel,
    console: Console,
) -> TrainState:
    """The state to go on from, with the batches after its step.

    Order of restore: the run's own latest state, then the weights of `init_from`, then none.
    """
    restored = checkpointer.restore_latest(parallel.single(state), parallel.replicated)
    if restored is not None:
        batches.seek(int(restored.step))
        return parallel.spread(restored)
    if config.init_from:
        names = dataset.description.label_names
        state = transfer.start(parallel.single(state), config, names, console.print, parts)
        return parallel.spread(state)
    return state


def _variables(state: TrainState, parallel: DataParallel) -> dict[str, Any]:
    """The parameters and statistics on the host, each block's by its own name."""
    state = parallel.single(state)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return repeat.unpack(jax.device_get(variables), state.loops)
