"""What a person reads of a run before its first step and after its last."""

import math
import os
import pathlib

import flax.linen as nn
import jax
import ml_collections

from resflax import config as config_lib
from resflax.data import sources
from resflax.models import count
from resflax.parallel import DataParallel
from resflax.parts import NONE, Parts, unmapped
from resflax.run import workdir as workdir_lib
from resflax.run.console import Console


def introduce(
    console: Console,
    config: ml_collections.ConfigDict,
    model: nn.Module,
    dataset: sources.Dataset,
    parallel: DataParallel,
    workdir: pathlib.Path,
) -> None:
    """Prints what a run is: its network, its data, its devices and its directory."""
    description = dataset.description
    changes = ", ".join(f"{k} {v}" for k, v in config_lib.model_overrides(config).items())
    console.print(f"{config.model.name} with {changes}")
    for part, text in workdir_lib.read_parts(workdir).items():
        console.print(f"{part} of the user's own: {text}")
    console.network(count(unmapped(model), description.image_shape))
    validation_images = f", {len(dataset.val):,} validation" if dataset.val is not None else ""
    console.print(
        f"{description.name}: {len(dataset.train):,} training{validation_images} and "
        f"{len(dataset.test):,} test images, {' x '.join(map(str, description.image_shape))}, "
        f"{description.num_classes} labels"
    )
    left_out = len(dataset.train) % config.train.batch_size
    console.print(
        f"{config.train.epochs:g} epochs, batches of {config.train.batch_size}"
        f"{f' (an epoch leaves out {left_out} images)' if left_out else ''}, "
        f"{parallel.num_devices} x {jax.devices()[0].device_kind} ({parallel.mode})"
    )
    console.print(f"workdir: {workdir}\n")


def conclude(
    console: Console,
    workdir: pathlib.Path,
    parts: Parts,
    result: dict[str, float],
    best_epoch: float,
) -> None:
    """Prints what came out of a run, and how to restore it.

    Args:
      console: of the run.
      workdir: of the run.
      parts: of the user's own.
      result: see train.train_and_evaluate.
      best_epoch: epochs before the best evaluation.
    """
    best = f"best {result['best/top1']:.2%} (step {result['best/step']}, epoch {best_epoch:g})"
    if not math.isfinite(result["eval/loss"]):
        console.print("\nThe last evaluation is not finite: the logits of some images are not.")
    of = " of the validation images" if "test/top1" in result else ""
    console.print(
        f"\ntop-1{of} {result['eval/top1']:.2%} after the last step; "
        f"{best if result['best/step'] else 'none was finite'}; {result['seconds']:.0f} s in all",
        style="bold",
    )
    if not of:
        console.print(
            "The best was chosen by the test images; config.data.val_share sets others aside."
        )
    elif "best/test_top1" in result:
        console.print(
            f"top-1 of the test images {result['test/top1']:.2%} after the last step, "
            f"{result['best/test_top1']:.2%} at the best one",
            style="bold",
        )
    console.print(
        f"{workdir}: {workdir_lib.CONFIG}, {workdir_lib.RESULT}, {workdir_lib.METRICS}, "
        f"{workdir_lib.CURVES}, {workdir_lib.CHECKPOINTS}/, {workdir_lib.EVENTS}/\n"
        f"To restore it:\n"
        f"  import resflax\n"
        f'  run = resflax.restore("{workdir}"{_network(parts)})  # best=True: the best step\n'
        f"  logits = run.model.apply(run.variables, run.preprocess(images), train=False)"
    )


def _network(parts: Parts) -> str:
    """What `resflax.restore` takes for a network of the user's own: its file, or itself."""
    if parts.model is None:
        return ""
    if parts.file == NONE.file:  # given as an object
        return ", model=model"
    return f', config_file="{os.path.abspath(parts.file)}"'
