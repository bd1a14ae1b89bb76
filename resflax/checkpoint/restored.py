"""A trained network, restored from a run's directory into a script."""

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from resflax import arguments, validation
from resflax import config as config_lib
from resflax import workdir as workdir_lib
from resflax.checkpoint import leaves, saver, store
from resflax.checkpoint.manifest import DamageError, Manifest
from resflax.checkpoint.store import CheckpointError
from resflax.data import augmentation
from resflax.data.sources import Description
from resflax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained network, out of a run's directory.

    Attributes:
      model: the flax.linen module.
      variables: 'params' and 'batch_stats', as evaluated: the averages where the run kept them.
      config: of the run.
      step: of the checkpoint.
      dataset: what the network was trained on.
    """

    model: nn.Module
    variables: dict[str, Any]
    config: ml_collections.ConfigDict
    step: int
    dataset: Description

    @property
    def preprocess(self) -> Callable[[jax.Array], jax.Array]:
        """From uint8 images [N, H, W, C] to what the network takes."""
        return augmentation.normalizer(self.dataset.mean, self.dataset.std)


def restore_model(
    workdir: str | pathlib.Path, step: int | None = None, *, best: bool = False
) -> Run:
    """Restores the network of a run, on the first device whatever it was trained on.

    Every byte of it is verified before. Nothing in the directory is changed.

    Args:
      workdir: of the run.
      step: of the checkpoint; None: the latest that is not damaged; a warning names those that are.
      best: instead of the latest, the one with the best evaluation.

    Raises:
      UserError: if the directory holds no run, or the run no such checkpoint, or a damaged one.
    """
    workdir = pathlib.Path(os.path.realpath(arguments.path(workdir)))
    config = workdir_lib.read_config(workdir)
    try:
        validation.validate(config)
    except UserError as error:
        raise UserError(f"{workdir / workdir_lib.CONFIG}: {error}") from None
    dataset = workdir_lib.read_description(workdir)
    model = config_lib.build_model(config, dataset.num_classes)
    item = "ema" if config.train.ema_decay else "variables"
    step, manifest = _choose(workdir, step, best, item)
    what = f"the checkpoint of step {step} in {workdir}"
    images = jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    shapes = {"batch_stats": {}} | shapes
    saved = {p: leaf for p, leaf in manifest.leaves.items() if p.partition("/")[0] == item}
    leaves.require_same(saved, {item: shapes}, what)
    # Of several processes, each has all of it on a device of its own.
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        variables = checkpointer.restore(
            store.directory(workdir) / str(step) / item, saver.abstract(shapes, device)
        )
    sums = jax.tree.map(lambda x: np.array(leaves.checksum(np.asarray(x))), variables)
    leaves.require_checksums(saved, {item: sums}, what)
    return Run(model, variables, config, step, dataset)


def _choose(workdir: pathlib.Path, step: int | None, best: bool, item: str) -> tuple[int, Manifest]:
    """The step to restore, and its manifest, with which all files of the item agree."""
    directory = store.directory(workdir)
    steps = store.steps(workdir)
    if not steps:
        raise CheckpointError(f"{workdir} has no checkpoint yet.")
    if step is not None and step not in steps:
        raise CheckpointError(
            f"{workdir} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}."
        )
    if step is None and best:
        step = store.best({s: Manifest.read(directory / str(s)) for s in steps})
    if step is not None:
        try:
            return step, Manifest.verify(directory / str(step), item)
        except DamageError as error:
            raise CheckpointError(f"the checkpoint of step {step} is damaged: {error}") from None
    remarks: list[str] = []
    for good in store.newest_first(workdir, remarks.append, item):
        for remark in remarks:
            warnings.warn(f"{remark} Step {good[0]} is restored.", stacklevel=3)
        return good
    raise CheckpointError(f"all checkpoints in {directory} are damaged: {' '.join(remarks)}")
