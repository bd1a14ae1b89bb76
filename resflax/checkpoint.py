"""Checkpoints of a run: saved while it trains, restored to go on or into a script.

A step's checkpoint has the items 'variables', 'ema' (where averages are kept), 'optimizer' (with
the step and the random key) and 'data' (the position in the data), so that a script reads no more
than the variables.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from resflax import config as config_lib
from resflax import workdir as workdir_lib
from resflax.data import augmentation
from resflax.data.sources import Description
from resflax.models import repeat
from resflax.train_state import TrainState

BEST_METRIC = "top1"


class CheckpointError(ValueError):
    """There is no such checkpoint; the message says which there are."""


class Checkpointer:
    """Saves and restores the states of one run, in the background where it can."""

    def __init__(self, workdir: pathlib.Path, keep: int):
        """Opens the run's checkpoints.

        Args:
          workdir: absolute.
          keep: how many of the latest to keep; the best by the evaluation's top-1 stays besides.
        """
        self._manager = ocp.CheckpointManager(
            workdir / workdir_lib.CHECKPOINTS,
            options=ocp.CheckpointManagerOptions(
                best_fn=lambda metrics: metrics[BEST_METRIC],
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [
                        checkpoint_managers.LatestN(keep),
                        checkpoint_managers.BestN(get_metric_fn=lambda m: m[BEST_METRIC], n=1),
                    ]
                ),
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, state: TrainState, position: dict[str, Any], metrics: dict[str, float]) -> None:
        """Starts to save a state.

        Args:
          state: one copy (see DataParallel.single).
          position: of the training data.
          metrics: of the state's evaluation.
        """
        if state.loops:
            # On the host, where a slice costs nothing: the stacks have hundreds.
            state = jax.device_get(state)
        items = {k: ocp.args.StandardSave(tree) for k, tree in _items(state).items()}
        args = ocp.args.Composite(data=ocp.args.JsonSave(position), **items)
        self._manager.save(int(state.step), args=args, metrics=metrics)

    def restore_latest(
        self, state: TrainState, sharding: jax.sharding.Sharding
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The latest state and its position in the data, or None if there is none.

        Args:
          state: of the same shapes as the saved one; its values do not matter.
          sharding: of the restored arrays.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        targets = {
            name: ocp.args.StandardRestore(_abstract(tree, sharding))
            for name, tree in jax.eval_shape(_items, state).items()
        }
        args = ocp.args.Composite(data=ocp.args.JsonRestore(), **targets)
        restored = self._manager.restore(step, args=args)
        items = {name: repeat.pack(restored[name], state.loops) for name in targets}
        state = state.replace(**items["variables"], **items["optimizer"], ema=items.get("ema"))
        return state, restored["data"]

    @property
    def best(self) -> tuple[int, float] | None:
        """The step with the best evaluation of those kept, and its top-1; None if there is none."""
        step = self._manager.best_step()
        return None if step is None else (step, self._manager.metrics(step)[BEST_METRIC])

    def wait(self) -> None:
        """Returns when what was to be saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and ends the background threads."""
        self._manager.close()


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

    Args:
      workdir: of the run.
      step: of the checkpoint; None: the latest.
      best: instead of the latest, the one with the best evaluation.

    Raises:
      ValueError: if the directory holds no run, or the run no such checkpoint.
    """
    workdir = pathlib.Path(workdir).expanduser().resolve()
    config = workdir_lib.read_config(workdir)
    dataset = workdir_lib.read_description(workdir)
    model = config_lib.build_model(config, dataset.num_classes)
    options = ocp.CheckpointManagerOptions(
        create=False, best_fn=lambda metrics: metrics[BEST_METRIC]
    )
    if not (workdir / workdir_lib.CHECKPOINTS).is_dir():
        raise CheckpointError(f"{workdir} has no checkpoint yet.")
    with ocp.CheckpointManager(workdir / workdir_lib.CHECKPOINTS, options=options) as manager:
        steps = list(manager.all_steps())
        if not steps:
            raise CheckpointError(f"{workdir} has no checkpoint yet.")
        if step is None:
            step = manager.best_step() if best else manager.latest_step()
        if step not in steps:
            raise CheckpointError(
                f"{workdir} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}."
            )
        item = "ema" if config.train.ema_decay else "variables"
        images = jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32)
        shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
        target = _abstract(
            {"batch_stats": {}} | shapes, jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
        variables = manager.restore(step, args=args)[item]
    return Run(model, variables, config, step, dataset)


def _items(state: TrainState) -> dict[str, Any]:
    items = {
        "variables": {"params": state.params, "batch_stats": state.batch_stats},
        "optimizer": {"opt_state": state.opt_state, "step": state.step, "key": state.key},
    }
    if state.ema is not None:
        items["ema"] = state.ema
    return {name: repeat.unpack(tree, state.loops) for name, tree in items.items()}


def _abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
