"""Parameters, multiply-adds, activations and memory of a network, from shapes alone."""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import Var

from resflax.errors import UserError
from resflax.models import layers
from resflax.models.gates import Gate
from resflax.models.interception import intercepted


@dataclasses.dataclass(frozen=True)
class Count:
    """What a network, or a part of one, costs for one image.

    Attributes:
      params: trainable parameters.
      macs: multiply-adds of the convolutions and dense layers, ours and flax's. Biases, norms,
        activations, pooling and additions are not counted: the convention of the papers and of
        torchvision. Auxiliary classifiers are counted, although they run in training only.
      activations: numbers that the convolutions and dense layers give out.
      output_shape: of the part, without the batch axis; where it gives out several arrays, of the
        first.
      parts: the same of the submodules, by name, in the order of their use; each has its own parts.
      activation_memory: of a network that was counted with a batch size, bytes that a training step
        keeps from the forward to the backward pass: see `count`.
      gate: whether the part is a gate: see models.gates.Gate.
    """

    params: int
    macs: int
    activations: int
    output_shape: tuple[int, ...] = ()
    parts: dict[str, "Count"] = dataclasses.field(default_factory=dict)
    activation_memory: int | None = None
    gate: bool = False


def count(model: nn.Module, input_shape: Sequence[int], batch_size: int | None = None) -> Count:
    """Counts a network's parameters and multiply-adds; nothing is computed or allocated.

    Args:
      model: a network of `create_model`.
      input_shape: of one image, (H, W, C).
      batch_size: images in the training step whose memory is counted; None: that is not counted,
        which takes longer than the rest.

    Returns:
      The counts, with one part for each submodule of the network. `activation_memory` is the size
      of what reverse-mode differentiation of the network, in training mode, keeps of the images:
      themselves and what the layers save, not the parameters, the running statistics and constants.
      It is what JAX asks for; XLA may fuse or recompute some of it.

    Raises:
      UserError: if the network does not take such images, or `batch_size` is less than 1.
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be at least 1.")
    # Of blocks in a loop, or in a checkpoint's function, only one would be seen, or none.
    network = _changed(model, scan=0, remat=False)
    counter = _Counter()
    image = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    with intercepted(counter):
        jax.eval_shape(lambda x: network.init(jax.random.key(0), x, train=False), image)
    (counted,) = counter.parts.values()
    if batch_size is None:
        return counted
    # No axis is mapped here.
    memory = _activation_memory(_changed(model, axis_name=None), (batch_size, *input_shape))
    return dataclasses.replace(counted, activation_memory=memory)


def num_params(tree: Any) -> int:
    """The number of scalars in a tree of arrays (or of their shapes)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _changed(model: nn.Module, **fields: Any) -> nn.Module:
    """The network with other values of those fields that it has."""
    return model.clone(**{name: value for name, value in fields.items() if hasattr(model, name)})


class _Counter:
    """An interceptor of Flax that counts the modules which it sees being called.

    Tracing is what takes time, and a network of 1202 layers has the same block hundreds of times:
    a module of the same fields on inputs of the same shapes as an earlier one is not traced again.

    Attributes:
      parts: of the module whose call is under way: those that have been called so far.
    """

    def __init__(self) -> None:
        self.parts: dict[str, Count] = {}
        self._seen: dict[Hashable, tuple[Count, Any]] = {}
        self._inside = False

    def __call__(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Calls the module, or gives out zeros of the shape that it would."""
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if self._inside and not module.path and module.is_initializing():
            # An `init` inside the network, which makes the variables of many blocks at once. Those
            # that are not there, a block makes itself when it is called.
            return None
        self._inside = True
        key = _fields(module), _structure((args, kwargs))
        if key in self._seen:
            counted, shapes = self._seen[key]
            out = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        else:
            siblings, self.parts = self.parts, {}
            out = call(*args, **kwargs)
            counted = _count_call(module, out, self.parts)
            self.parts = siblings
            self._seen[key] = counted, jax.tree.map(_shape, out)
        name = module.name or ""
        if name in self.parts:  # called again: the same parameters, and its work once more
            counted = _again(self.parts[name], counted)
        self.parts[name] = counted
        return out


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _count_call(module: nn.Module, out: Any, parts: dict[str, Count]) -> Count:
    """The counts of one call of a module, given those of the modules that it called."""
    macs = activations = 0
    if layers.is_product(module):
        # Each number that comes out is a sum over the kernel's other axes, whatever the groups.
        kernel = module.variables["params"]["kernel"]
        macs, activations = out.size * math.prod(kernel.shape[:-1]), out.size
    own = {k: v for k, v in module.variables.get("params", {}).items() if k not in parts}
    return Count(
        num_params(own) + sum(part.params for part in parts.values()),
        macs + sum(part.macs for part in parts.values()),
        activations + sum(part.activations for part in parts.values()),
        jax.tree.leaves(out)[0].shape[1:],
        parts,
        gate=isinstance(module, Gate),
    )


def _again(first: Count, counted: Count) -> Count:
    """The counts of a module that has been called twice, and so of its parts."""
    return dataclasses.replace(
        counted,
        macs=first.macs + counted.macs,
        activations=first.activations + counted.activations,
        parts={
            name: _again(first.parts[name], part) if name in first.parts else part
            for name, part in counted.parts.items()
        },
    )


def _structure(value: Any) -> Hashable:
    """What decides the counts of a call, to be compared: shapes of arrays, fields of modules.

    Constructors are made anew in every network by functools.partial, so they are compared by what
    they call and with which arguments. What cannot be compared is equal to nothing; nor is a module
    that another one is given, whose parameters may be shared.
    """
    if isinstance(value, jax.Array):
        return jax.Array, value.shape, value.dtype
    if isinstance(value, functools.partial):
        return functools.partial, *map(_structure, (value.func, value.args, value.keywords))
    if isinstance(value, list | tuple):
        return type(value), *map(_structure, value)
    if isinstance(value, Mapping):
        return dict, *((name, _structure(value[name])) for name in sorted(value))
    if isinstance(value, nn.Module):
        return object()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    try:
        hash(value)
    except TypeError:
        return object()
    return value


def _fields(value: Any) -> Hashable:
    """A dataclass or module, to be compared by all but its name and its owner."""
    names = (f.name for f in dataclasses.fields(value) if f.name not in ("name", "parent"))
    return type(value), *(_structure(getattr(value, name)) for name in names)


def _activation_memory(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes that the vector-Jacobian product of a network on images [N, H, W, C] keeps."""

    def residuals(images: jax.Array, key: jax.Array, params: Any, variables: Any) -> Any:
        def forward(params: Any) -> tuple[jax.Array, Any]:
            return model.apply(
                {"params": params, **variables},
                images,
                train=True,
                mutable=list(variables),
                rngs={"dropout": key},
            )

        _, backward, _ = jax.vjp(forward, params, has_aux=True)
        return backward

    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    variables = dict(jax.eval_shape(functools.partial(model.init, train=False), key, images))
    params = variables.pop("params")
    trace = jax.make_jaxpr(residuals, return_shape=True)
    closed, kept = trace(images, key, params, variables)
    # What comes of the images or of random numbers. The rest are parameters, casts of them, and
    # constants, such as the zeros that a ReLU's gradient selects.
    activations = set(closed.jaxpr.invars[:2])
    for eqn in closed.jaxpr.eqns:
        if any(v in activations for v in eqn.invars if isinstance(v, Var)):
            activations.update(eqn.outvars)
    # By variable: what two layers keep is there once.
    leaves = dict(zip(map(id, closed.jaxpr.outvars), jax.tree.leaves(kept), strict=True))
    kept_activations = (leaves[id(v)] for v in activations if id(v) in leaves)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept_activations)
