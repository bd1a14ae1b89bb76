"""A trained network, restored from a run's directory into a script."""

import dataclasses
import os
import pathlib
import time
import warnings
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from resflax import validation
from resflax.checkpoint import leaves, origin, saver, store
from resflax.checkpoint.manifest import DamageError, Manifest
from resflax.checkpoint.store import CheckpointError
from resflax.data import sources
from resflax.data.preprocessing import Preprocessing
from resflax.data.sources import Dataset, Description
from resflax.errors import UserError
from resflax.parts import NONE, Parts
from resflax.process import arguments
from resflax.run import workdir as workdir_lib

# Seconds in which a reader follows a run that deletes the checkpoints it has come to.
_PATIENCE = 60.0


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained network, out of a run's directory.

    Attributes:
      model: the flax.linen module.
      variables: 'params' and 'batch_stats', as evaluated: the averages where the run kept them.
      config: of the run.
      step: of the checkpoint.
      dataset: what the network was trained on.
      workdir: where it was.
      parts: of the user's own, as they were given to restore it.
    """

    model: nn.Module
    variables: dict[str, Any]
    config: ml_collections.ConfigDict
    step: int
    dataset: Description
    workdir: pathlib.Path = pathlib.Path()
    parts: Parts = NONE

    def load_dataset(self, changes: Mapping[str, Any] | None = None, **more: Any) -> Dataset:
        """The images of the run, or other ones; its config is changed accordingly.

        Args:
          changes: fields of `config.data`, where the images are now, or of other images; with
            them, a data set of the user's own counts no more.
          **more: further fields.

        Raises:
          UserError: if there are no such data, or they are of the run's own config file, and not
            among the parts that were given.
        """
        config = validation.with_data(self.config, {**(changes or {}), **more})
        if changes:
            return sources.load(config.data)
        if self.parts.dataset is None:
            workdir_lib.require_part(self.workdir, "dataset", "data set")
        return self.parts.load_dataset(config)

    @property
    def preprocess(self) -> Preprocessing:
        """From files, PIL images or arrays to what the network takes: see Preprocessing."""
        size, dataset = self.dataset.image_shape[0], self.dataset
        resize = max(size, self.config.data.eval_resize)
        return Preprocessing(dataset.image_shape, dataset.mean, dataset.std, resize)


def restore_model(
    workdir: str | pathlib.Path,
    step: int | None = None,
    *,
    best: bool = False,
    parts: Parts | None = None,
) -> Run:
    """Restores the network of a run, on the first device whatever it was trained on.

    Every byte of it is verified before. Nothing in the directory is changed. Where a run at work
    deletes the step that is being read, the one after it is restored. A warning names the first
    array that is not finite, if there is one.

    Args:
      workdir: of the run.
      step: of the checkpoint; None: the latest that is not damaged; a warning names those that are.
      best: instead of the latest, the one with the best evaluation.
      parts: of the user's own, where the run has some; nothing in the directory is imported.

    Raises:
      UserError: if the directory holds no run, or the run no such checkpoint, or a damaged one.
    """
    workdir = pathlib.Path(os.path.realpath(arguments.path(workdir)))
    deadline = time.monotonic() + _PATIENCE
    while True:
        found = store.steps(workdir)
        try:
            return _restore(workdir, step, best, parts or NONE)
        except Exception:  # which is what orbax makes of tensorstore's errors
            # Did a run at work save a later step, and delete this one while it was read?
            now = store.steps(workdir)
            gone = now != found if step is None else step in found and step not in now
            if not gone or time.monotonic() > deadline:
                raise


def _restore(workdir: pathlib.Path, step: int | None, best: bool, parts: Parts) -> Run:
    config = workdir_lib.read_config(workdir)
    if parts.model is None:
        workdir_lib.require_part(workdir, "model", "network")
    try:
        validation.validate(config, own=parts.own)
    except UserError as error:
        raise UserError(f"{workdir / workdir_lib.CONFIG}: {error}") from None
    dataset = workdir_lib.read_description(workdir)
    model = parts.build_model(config, dataset.num_classes)
    item = "ema" if config.train.ema_decay else "variables"
    step, manifest = _choose(workdir, step, best, item, origin.of_run(config, dataset))
    if doubt := origin.doubt(manifest, workdir):
        warnings.warn(doubt, stacklevel=3)
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
    if (spoilt := leaves.not_finite(variables)) is not None:
        warnings.warn(
            f"{what} is not finite: {spoilt} has an infinite number or NaN.", stacklevel=3
        )
    return Run(model, variables, config, step, dataset, workdir, parts)


def _choose(
    workdir: pathlib.Path, step: int | None, best: bool, item: str, run: dict[str, Any]
) -> tuple[int, Manifest]:
    """The step to restore, and its manifest, with which all files of the item agree."""
    steps = store.steps(workdir)
    if not steps:
        raise CheckpointError(f"{workdir} has no checkpoint yet.")
    if step is not None and step not in steps:
        raise CheckpointError(
            f"{workdir} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}."
        )
    if step is None and best:
        step = store.best({s: store.read(workdir, s).metrics for s in steps})
    if step is not None:
        try:
            return step, store.verified(workdir, step, item, run)
        except DamageError as error:
            raise CheckpointError(f"the checkpoint of step {step} {error.kind}: {error}") from None
    remarks: list[str] = []
    for good in store.newest_first(workdir, remarks.append, item, run):
        for remark in remarks:
            warnings.warn(f"{remark} Step {good[0]} is restored.", stacklevel=4)
        return good
    raise CheckpointError(store.none_left(workdir, remarks))
