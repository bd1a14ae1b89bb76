"""Exact evaluation of a data set, while training or of a run: every image counts once.

python -m resflax.evaluate --workdir runs/... [--best | --step N] [--data FIELD=V]
"""

import collections
import dataclasses
import functools
import math
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax

from resflax import checkpoint, metrics, steps
from resflax.data import augmentation, given, pipeline, sources, transforms
from resflax.data.examples import Source
from resflax.errors import UserError
from resflax.models import repeat
from resflax.parallel import DataParallel, data_parallel
from resflax.parts import CONFIG_FILE_HELP, NONE, Parts
from resflax.process import distributed, runtime
from resflax.process.arguments import Parser, assignment, tell, values
from resflax.train_state import TrainState

# Batches on the devices whose sums have not been read: enough to keep the devices busy.
_AHEAD = 4


def evaluator(
    apply_fn: Callable[..., Any],
    dataset: sources.Dataset,
    batch_size: int,
    parallel: DataParallel,
) -> Callable[..., dict[str, float]]:
    """A function from a network's variables, and images, to its metrics on all of the images.

    Args:
      apply_fn: a network's `apply`.
      dataset: of the images.
      batch_size: over all processes and devices.
      parallel: how batches are laid over the devices; the variables have to be laid so too.

    Returns:
      (variables, source) -> 'loss' (nats), 'top1' and 'top5' (fractions), means over the images of
      the source, by default the test images.
    """
    description = dataset.description
    if dataset.test_crops > 1:
        apply_fn = ten_crop(apply_fn, description.image_shape[0])
    eval_step = parallel.step(
        functools.partial(
            steps.eval_step,
            axis_name=parallel.axis_name,
            apply_fn=apply_fn,
            normalize=augmentation.normalizer(description.mean, description.std),
        ),
        donate_state=False,
    )

    def evaluate(variables: Any, source: Source = dataset.test) -> dict[str, float]:
        total: collections.Counter[str] = collections.Counter()
        pending: collections.deque[dict[str, jax.Array]] = collections.deque()

        def add() -> None:
            """Adds up the oldest batch's sums, on the host, in double precision."""
            (sums,) = parallel.fetch(pending.popleft())
            for name, value in sums.items():
                total[name] += value

        for batch in pipeline.eval_batches(source, batch_size, dataset.threads):
            pending.append(eval_step(variables, parallel.put(batch)))
            if len(pending) > _AHEAD:
                add()
        while pending:
            add()
        return {name: total[name] / total["count"] for name in total if name != "count"}

    return evaluate


def unchosen(
    evaluate: Callable[..., dict[str, float]],
    dataset: sources.Dataset,
    state: TrainState,
    best_step: int,
    restore: Callable[[int], Any],
    parallel: DataParallel,
    report: Callable[[str], None],
) -> dict[str, float]:
    """The metrics of images that no state was chosen by: of further sets, and of the test images.

    The best state is read from its checkpoint, unless it is the last; where it is damaged, a line
    says so, and its metrics are left out.

    Args:
      evaluate: see evaluator.
      dataset: of the run; its test images count where it has others to validate on.
      state: after the last step.
      best_step: of the best state; 0: none was finite.
      restore: the variables of a step.
      parallel: lays them over the devices.
      report: called with the line.

    Returns:
      'eval_NAME/loss' and so on, 'test/loss' and so on, and 'best/test_loss' and so on.
    """
    result: dict[str, float] = {}
    for name, source in dataset.further.items():
        result |= named(f"eval_{name}/", evaluate(state.eval_variables, source))
    if dataset.val is None:  # the test images were evaluated all along
        return result
    best = evaluate(state.eval_variables)
    result |= named("test/", best)
    if best_step and best_step != int(parallel.single(state).step):
        distributed.on_first(lambda: True)  # which has written what all are to read
        try:
            variables = restore(best_step)
        except checkpoint.CheckpointError as error:
            report(f"The best state is not tested: {error}")
            return result
        packed = repeat.pack(jax.device_get(variables), state.loops)
        best = evaluate(parallel.replicate(packed))
    return result | (named("best/test_", best) if best_step else {})


def named(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    """The metrics under longer names: 'top1' -> 'eval/top1'."""
    return {f"{prefix}{name}": value for name, value in metrics.items()}


def ten_crop(apply_fn: Callable[..., Any], size: int) -> Callable[..., Any]:
    """A network's `apply` that looks at ten crops of each image (see transforms.ten_crop).

    Its logits are the logarithms of the mean of the ten predicted probabilities (Krizhevsky 2012,
    Section 4.1).

    Args:
      apply_fn: a network's `apply`.
      size: side of the crops, pixels.
    """

    def apply(variables: Any, images: jax.Array, *, train: bool) -> jax.Array:
        crops = transforms.ten_crop(images, size)

        def predict(crop: jax.Array) -> jax.Array:
            return jax.nn.log_softmax(apply_fn(variables, crop, train=train))

        # One after another, so that ten take no more memory than one.
        return jax.nn.logsumexp(lax.map(predict, crops), axis=0) - math.log(10)

    return apply


def evaluate_run(
    workdir: str | pathlib.Path,
    step: int | None = None,
    *,
    best: bool = False,
    data: Mapping[str, Any] | None = None,
    config_file: str | None = None,
    dataset: given.Given | None = None,
) -> dict[str, float]:
    """Evaluates the network of a run on its test images, on one device.

    Args:
      workdir: of the run.
      step: of the checkpoint; None: the latest.
      best: instead of the latest, the one with the best evaluation.
      data: where the images are now, or other ones of the same classes, by fields of `config.data`,
        such as {'folder.path': 'DIR'}; they are normalised as the run's.
      config_file: of a run with parts of the user's own: see resflax.parts.
      dataset: the images of a run that had the caller's own: see resflax.data.given.

    Returns:
      'step', and the metrics of `evaluator`.

    Raises:
      UserError: if there is no such run, checkpoint or data, or the data have other classes.
    """
    parts = NONE if config_file is None else Parts.of_file(config_file)
    if dataset is not None:
        parts = dataclasses.replace(parts, dataset=lambda config: dataset)
    return _evaluate(checkpoint.restore_model(workdir, step, best=best, parts=parts), data)


def _evaluate(run: checkpoint.Run, data: Mapping[str, Any] | None) -> dict[str, float]:
    parallel = data_parallel("jit", jax.devices()[:1])
    dataset = run.load_dataset(data)
    sources.require_like(dataset.description, run.dataset)
    # Normalised as the network was trained, also where the training images have changed since.
    same = dataclasses.replace(dataset.description, mean=run.dataset.mean, std=run.dataset.std)
    dataset = dataclasses.replace(dataset, description=same)
    evaluate = evaluator(run.model.apply, dataset, run.config.eval.batch_size, parallel)
    return {"step": run.step, **evaluate(run.variables)}


def main(argv: list[str] | None = None) -> int:
    """Prints the metrics of a run; returns the exit code."""
    parser = Parser(prog="python -m resflax.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument(
        "--data",
        action="append",
        type=assignment,
        default=[],
        metavar="FIELD=V",
        help="of config.data, such as folder.path=DIR: where the images are now",
    )
    parser.add_argument("--config_file", metavar="FILE.py", help=CONFIG_FILE_HELP)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="of the checkpoint; default: the latest")
    which.add_argument("--best", action="store_true", help="the step with the best evaluation")
    arguments = parser.parse_args(argv)
    try:
        own = None if arguments.config_file is None else Parts.of_file(arguments.config_file)
        run = checkpoint.restore_model(
            arguments.workdir, arguments.step, best=arguments.best, parts=own
        )
        found = _evaluate(run, values(arguments.data))
    except UserError as error:
        tell(error)
        return 2
    print(f"step {run.step}  {metrics.line(found, run.dataset.num_classes)}")
    if not math.isfinite(found["loss"]):
        print("warning: the logits of some images are not finite; none counts.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    runtime.configure()
    sys.exit(main())
