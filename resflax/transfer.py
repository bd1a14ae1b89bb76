"""Transfer: a network that starts from the weights of another, and of which parts stay as they are.

A part is named by the paths of its parameters, 'stage5_block3/conv1/kernel', and a regular
expression that they begin with: 'head', or 'stage5|head'.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import lax

from resflax import checkpoint
from resflax import config as config_lib
from resflax.data import sources
from resflax.errors import UserError
from resflax.interop import keras, torch
from resflax.models import layers, repeat
from resflax.models.interception import intercepted
from resflax.parts import NONE, Parts
from resflax.process import arguments
from resflax.run import workdir as workdir_lib
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
        with intercepted(interceptor):
            return apply_fn({**variables, "params": params}, *args, **kwargs)

    return apply


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Weights to start from.

    Attributes:
      model: the network that they are of.
      variables: 'params' and 'batch_stats'.
      origin: where they are, for a person.
      dataset: that they were trained on; None if it is not known.
    """

    model: nn.Module
    variables: PyTree
    origin: str
    dataset: sources.Description | None = None


def start(
    state: TrainState,
    config: ml_collections.ConfigDict,
    label_names: Sequence[str],
    report: Callable[[str], None] = lambda text: None,
    parts: Parts = NONE,
) -> TrainState:
    """A fresh state with the weights of `config.init_from`.

    A classifier that the weights lack, or have for other classes by their number or names, keeps
    its initial values; so do auxiliary ones.

    Args:
      state: one copy, before its first step.
      config: of the run.
      label_names: of its data.
      report: called with lines about what was loaded, what is new and what trains.
      parts: of the run; a network of the user's own can start from another run of it.

    Raises:
      TransferError: if there are no such weights, or they are another network's or not finite.
    """
    origin = config.init_from
    overrides = config_lib.model_overrides(config)
    weights = _load("config.init_from", origin, config.model.name, parts, **overrides)
    _check_same(weights.model, parts.build_model(config, len(label_names)), origin)
    fresh = {"params": state.params, "batch_stats": state.batch_stats}
    # Of another number of classes, or where their names are not known, the shapes decide.
    named = () if weights.dataset is None else weights.dataset.label_names
    renamed = len(named) == len(label_names) and (
        sources.other_names(named, label_names) is not None
    )
    unpacked = repeat.unpack(jax.device_get(fresh), state.loops)
    merged, new = _merge(unpacked, weights.variables, origin, new_head=renamed)
    _report(report, config, weights.origin, unpacked["params"], new)
    merged = repeat.pack(merged, state.loops)

    def place() -> PyTree:
        return jax.tree.map(
            lambda new, old: jax.device_put(np.asarray(new), old.sharding), merged, fresh
        )

    return state.replace(**place(), ema=None if state.ema is None else place())


def _report(
    report: Callable[[str], None],
    config: ml_collections.ConfigDict,
    origin: str,
    params: PyTree,
    new: Sequence[str],
) -> None:
    parts = sorted({name.split("/")[1] for name in new})
    report(f"weights loaded from {origin}; new: {', '.join(parts) or 'nothing'}")
    marks = jax.tree.leaves(trainable(params, config.train.trainable))
    sizes = [int(leaf.size) for leaf in jax.tree.leaves(params)]
    trained = sum(size for size, mark in zip(sizes, marks, strict=True) if mark)
    report(
        f"{trained:,} of {sum(sizes):,} parameters are trained (config.train.trainable "
        f"{config.train.trainable!r})"
    )


def teacher(
    student: sources.Description, path: str, network: str
) -> tuple[Callable[[PyTree, jax.Array], jax.Array], PyTree]:
    """A trained network, to learn from: see losses.distillation.

    Args:
      student: the data set, whose normalised images the teacher gets; as its own run normalised
        them, where it is a run's.
      path: a run's directory, or a file of weights.
      network: whose weights a file has; "" for a run.

    Returns:
      From its variables and images to its logits, in evaluation mode; and the variables, on the
      host.

    Raises:
      UserError: if there are no such weights, or they are for other classes or images.
    """
    field = "config.loss.distillation.teacher"
    location = arguments.path(path)
    if location.exists() and location.is_dir() == bool(network):
        right = "the name of the network whose weights this is" if location.is_file() else "''"
        raise TransferError(f"{field} {path}: its network {network!r} must be {right}.")
    weights = _load(field, path, network)
    own = weights.dataset
    if own is not None:
        sources.require_like(student, own, f" of {field} {path}")

    def apply(variables: PyTree, images: jax.Array) -> Any:
        if own is not None and (own.mean, own.std) != (student.mean, student.std):
            scale = np.divide(student.std, own.std).astype(np.float32)
            shift = np.divide(np.subtract(student.mean, own.mean), own.std).astype(np.float32)
            images = images * scale.reshape(1, 1, 1, -1) + shift.reshape(1, 1, 1, -1)
        return weights.model.apply(variables, images, train=False)

    variables = jax.tree.map(np.asarray, jax.device_get(weights.variables))
    images = jax.ShapeDtypeStruct((1, *student.image_shape), jnp.float32)
    try:
        found = jax.eval_shape(apply, variables, images).shape
    except (flax.errors.FlaxError, TypeError, ValueError) as error:
        shape = " x ".join(map(str, student.image_shape))
        reason = str(error).splitlines()[0]
        raise TransferError(f"{field} {path} does not take images of {shape}: {reason}") from None
    if found != (1, student.num_classes):
        raise TransferError(
            f"{field} {path} has {found[-1]} classes, the data set {student.num_classes}."
        )
    return apply, variables


def _load(field: str, name: str, network: str, parts: Parts = NONE, **overrides: Any) -> _Weights:
    """The finite weights of a run's directory, or of a file's `network` with some arguments."""
    path = arguments.path(name)
    if not path.exists():
        raise TransferError(f"{field} {path} does not exist: a run's directory or a file.")
    if path.is_dir():
        is_own = "model" in workdir_lib.read_parts(path)
        run = checkpoint.restore_model(path, parts=parts if is_own else None)
        weights = _Weights(run.model, run.variables, f"step {run.step} of {path}", run.dataset)
    else:
        read = keras.read if path.suffix.lower() in keras.SUFFIXES else torch.read
        model, variables, _ = read(network, path, **overrides)
        weights = _Weights(model, variables, str(path))
    if (array := checkpoint.not_finite(weights.variables)) is not None:
        raise TransferError(f"{field} {name}: {array} has an infinite number or NaN.")
    return weights


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


def _merge(
    fresh: PyTree, weights: PyTree, origin: str, *, new_head: bool
) -> tuple[PyTree, list[str]]:
    """The values of `weights` in the tree of `fresh`; and the paths of what stays fresh."""
    new: list[str] = []
    found = {_joined(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}

    def choose(path: Any, leaf: Any) -> Any:
        name = _joined(path)
        given = found.get(name)
        _, part, *_ = name.split("/")
        replaced = part == "head" or part.endswith("_aux")
        if given is not None and given.shape == leaf.shape and not (replaced and new_head):
            return given
        if replaced:
            new.append(name)
            return leaf
        shape = "nothing" if given is None else f"{given.shape}"
        raise TransferError(f"config.init_from {origin}: {name} is {leaf.shape}, there {shape}.")

    return jax.tree_util.tree_map_with_path(choose, fresh), new


def _joined(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
