"""Transfer: a network that starts from the weights of another, and of which parts stay as they are.

A part is named by the paths of its parameters, 'stage5_block3/conv1/kernel', and a regular
expression that they begin with: 'head', or 'stage5|head'.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from jax import lax

from resflax import arguments, checkpoint
from resflax import config as config_lib
from resflax.errors import UserError
from resflax.interop.keras import from_keras
from resflax.interop.torch import from_torch
from resflax.models import layers, repeat
from resflax.train_state import TrainState

PyTree = Any

# Fields of a network that do not change what its parameters mean.
_FREE = {
    "num_classes", "any_size", "form", "skip_scale", "residual_scale", "gate_bias", "drop_path",
    "drop_path_mode", "zero_init_last", "dropout", "kernel_init", "bn_momentum", "axis_name",
    "scan", "packed", "remat", "dtype", "aux_heads", "aux_dropout", "parent", "name",
}  # fmt: skip


class TransferError(UserError):
    """The weights do not fit the network; the message says which and why."""


def trainable(params: PyTree, pattern: str) -> PyTree:
    """Marks the parameters whose paths begin with the regular expression, as a tree of booleans.

    Raises:
      TransferError: if it is none of them.
    """
    marks = jax.tree_util.tree_map_with_path(
        lambda path, _: re.match(pattern, _joined(path)) is not None, params
    )
    if not any(jax.tree.leaves(marks)):
        parts = ", ".join(params)
        raise TransferError(f"config.train.trainable {pattern!r} begins no parameter of {parts}.")
    return marks


def freeze(apply_fn: Callable[..., Any], pattern: str) -> Callable[..., Any]:
    """A network's `apply` in which all that `trainable` does not mark is constant.

    Its parameters have no gradient, and its batch norms, also in training, use the running
    statistics and leave them alone: what a frozen part gives out depends on its input only.
    """

    def interceptor(next_fn, args, kwargs, context):
        module = context.module
        constant = not isinstance(module, layers.BatchNorm) or module.use_running_average
        if constant or re.match(pattern, "/".join((*module.path, "bias"))):
            return next_fn(*args, **kwargs)
        # The same variables, in evaluation mode.
        return module.clone(parent=module.scope, use_running_average=True)(*args, **kwargs)

    def apply(variables: PyTree, *args: Any, **kwargs: Any) -> Any:
        params = variables["params"]
        params = jax.tree.map(
            lambda leaf, train: leaf if train else lax.stop_gradient(leaf),
            params,
            trainable(params, pattern),
        )
        with nn.intercept_methods(interceptor):
            return apply_fn({**variables, "params": params}, *args, **kwargs)

    return apply


def start(state: TrainState, config: ml_collections.ConfigDict, num_classes: int) -> TrainState:
    """A fresh state with the weights of `config.init_from`.

    A classifier for another number of classes keeps its initial values; so do auxiliary ones that
    the weights lack.

    Args:
      state: one copy, before its first step.
      config: of the run.
      num_classes: of its data.

    Raises:
      TransferError: if there are no such weights, or they are another network's.
    """
    source, variables = _load(config)
    _check_same(source, config_lib.build_model(config, num_classes), config.init_from)
    fresh = {"params": state.params, "batch_stats": state.batch_stats}
    merged = _merge(repeat.unpack(jax.device_get(fresh), state.loops), variables, config.init_from)
    merged = repeat.pack(merged, state.loops)

    def place() -> PyTree:
        return jax.tree.map(
            lambda new, old: jax.device_put(np.asarray(new), old.sharding), merged, fresh
        )

    return state.replace(**place(), ema=None if state.ema is None else place())


def _load(config: ml_collections.ConfigDict) -> tuple[nn.Module, PyTree]:
    path = arguments.path(config.init_from)
    if not path.exists():
        raise TransferError(f"config.init_from {path} does not exist: a run's directory or a file.")
    if path.is_dir():
        run = checkpoint.restore_model(path)
        return run.model, run.variables
    read = from_keras if path.suffix == ".h5" else from_torch
    return read(config.model.name, path, **config_lib.model_overrides(config))


def _check_same(source: nn.Module, target: nn.Module, origin: str) -> None:
    """Raises TransferError where equal parameters would mean something else."""
    if type(source) is not type(target):
        raise TransferError(
            f"config.init_from {origin} is a {type(source).__name__}, config.model.name a "
            f"{type(target).__name__}."
        )
    different = [
        f"config.model.{field.name} is {getattr(target, field.name)!r}, of the weights "
        f"{getattr(source, field.name)!r}"
        for field in dataclasses.fields(target)
        if field.name not in _FREE and getattr(source, field.name) != getattr(target, field.name)
    ]
    if different:
        raise TransferError(f"config.init_from {origin}: {'; '.join(different)}.")


def _merge(fresh: PyTree, weights: PyTree, origin: str) -> PyTree:
    """The values of `weights` in the tree of `fresh`."""
    found = {_joined(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}

    def choose(path: Any, leaf: Any) -> Any:
        name = _joined(path)
        given = found.get(name)
        _, part, *_ = name.split("/")
        replaced = part == "head" or part.endswith("_aux")
        if given is not None and given.shape == leaf.shape:
            return given
        if replaced:
            return leaf
        shape = "nothing" if given is None else f"{given.shape}"
        raise TransferError(f"config.init_from {origin}: {name} is {leaf.shape}, there {shape}.")

    return jax.tree_util.tree_map_with_path(choose, fresh)


def _joined(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
