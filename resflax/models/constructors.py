"""A part of a network by its name in a table, or by a constructor of anybody's own.

A constructor is a flax.linen module class, a functools.partial of one, or a function that gives a
module. It is called with `name`, and with those of the settings of its axis that it has a field
for and that a partial has not bound: a class asks for a setting by having the field.

| axis        | table                | settings                              | of the module      |
|-------------|----------------------|---------------------------------------|--------------------|
| gate        | gates.GATES          | COMMON                                | x -> the same size |
| norm        | layers.NORMS         | see layers.norm                       | x -> the same size |
| shortcut    | shortcuts.SHORTCUTS  | COMMON, filters, stride, kernel_size  | x -> size of F(x)  |
| skip        | skips.SKIPS          | COMMON, skip_scale, residual_scale,   | x, shortcut, F(x)  |
|             |                      | gate_bias                             | -> the last two    |
| downsample  | residual.DOWNSAMPLES | COMMON, stride                        | x -> x, smaller    |
| stem        | stem.STEMS           | COMMON, filters, last, pool,          | images -> x        |
|             |                      | conv_bias                             |                    |
| act         | layers.ACTIVATIONS   | none: it is a function                | x -> the same size |
| kernel_init | layers.INITS         | none: it is a flax initialiser        |                    |

x is [N, H, W, C], F(x) what the block's convolutions give. COMMON are `conv` and `norm`, of the
network's layers: `conv(filters, kernel_size, stride, groups=1, use_bias=False, name="...")` (see
layers.Conv) and `norm(name="...")` are modules of one argument; `act`, a function; `train`, whether
the network is trained; and `dtype`, of its computation.

Modules take and give arrays; what comes out in another dtype is cast to that of x. A class with the
attribute `deferred = True` takes and gives what a norm left to be computed as well: see
ops.norm.Affine. Variables can be in the collections 'params' and 'batch_stats'.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from resflax.errors import UserError
from resflax.models import checks
from resflax.ops import norm as norm_ops
from resflax.ops.norm import Activations, Affine

# A constructor with its settings already bound by functools.partial.
ModuleDef = Callable[..., nn.Module]

# What the field of an axis holds: a name of the table, or a constructor (of 'act', a function).
Choice = str | Callable[..., Any]

COMMON = ("conv", "norm", "act", "train", "dtype")

# What each axis' constructors can ask for.
SETTINGS: dict[str, tuple[str, ...]] = {
    "gate": COMMON,
    "norm": ("train", "use_running_average", "momentum", "epsilon", "axis_name", "dtype"),
    "shortcut": (*COMMON, "filters", "stride", "kernel_size"),
    "skip": (*COMMON, "skip_scale", "residual_scale", "gate_bias"),
    "downsample": (*COMMON, "stride"),
    "stem": (*COMMON, "filters", "last", "pool", "conv_bias"),
}


def check(axis: str, choice: Any, table: Mapping[str, Any]) -> None:
    """Raises UserError unless a choice is a name of its table or can be called as its axis asks."""
    if isinstance(choice, str):
        checks.choice(axis, choice, table)
        return
    if isinstance(choice, nn.Module):
        raise UserError(
            f"{axis} is an object of {describe(type(choice))}: give the class, or "
            f"functools.partial({describe(type(choice))}, ...)."
        )
    if not callable(choice):
        raise UserError(
            f"{axis} {choice!r} is neither a constructor nor one of {', '.join(map(repr, table))}."
        )
    try:
        hash(choice)
    except TypeError:
        raise UserError(f"{axis} {describe(choice)} cannot be hashed, as networks are.") from None
    if axis in SETTINGS:
        _check_arguments(axis, choice)


def _check_arguments(axis: str, constructor: ModuleDef) -> None:
    owner = made(constructor)
    if isinstance(owner, type) and not issubclass(owner, nn.Module):
        raise UserError(f"{axis} {describe(owner)} is no flax.linen module.")
    arguments = inspect.signature(constructor).parameters
    if "name" not in arguments:
        raise UserError(f"{axis} {describe(constructor)} does not take the argument `name`.")
    for name, argument in arguments.items():
        named = argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
        known = (*SETTINGS[axis], "name", "parent")
        if named and argument.default is argument.empty and name not in known:
            raise UserError(
                f"{axis} {describe(constructor)} has a field `{name}` without a value; bind it: "
                f"functools.partial({describe(constructor)}, {name}=...)."
            )


class Bound(functools.partial[Any]):
    """A partial that is equal to one of the same function and arguments, as networks are."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, functools.partial) and _parts(self) == _parts(other)

    def __hash__(self) -> int:
        # Arguments may be such as have no hash.
        return hash((self.func, len(self.args), *sorted(self.keywords)))


def _parts(partial: functools.partial[Any]) -> tuple[Any, ...]:
    return partial.func, partial.args, partial.keywords


def comparable(value: Any) -> Any:
    """A partial as one that can be compared; of anything else, itself."""
    if isinstance(value, functools.partial):
        return Bound(value.func, *value.args, **value.keywords)
    return value


def chosen(choice: Any, table: Mapping[str, Any]) -> Any:
    """What stands in the table under a name; of anything else, itself."""
    return table[choice] if isinstance(choice, str) else choice


def made(constructor: Any) -> Any:
    """The class (or function) that a partial calls at last."""
    return constructor.func if isinstance(constructor, functools.partial) else constructor


def declared(constructor: ModuleDef) -> set[str]:
    """The fields that can be set yet."""
    bound = constructor.keywords if isinstance(constructor, functools.partial) else {}
    return inspect.signature(constructor).parameters.keys() - bound.keys()


def bind(constructor: ModuleDef, **settings: Any) -> ModuleDef:
    """The constructor with those of the settings that it has a field for, and that are not bound.

    A norm among them gives arrays, unless what is constructed is `deferred`.
    """
    wanted = declared(constructor)
    kept = {name: value for name, value in settings.items() if name in wanted}
    if "norm" in kept and not getattr(made(constructor), "deferred", False):
        kept["norm"] = bind(kept["norm"], computed=True)
    return functools.partial(constructor, **kept) if kept else constructor


def describe(part: Any) -> str:
    """The name of the class or function, for messages."""
    part = made(part)
    return getattr(part, "__qualname__", None) or type(part).__qualname__


def title(choice: Any) -> str:
    """A choice, for messages."""
    return describe(choice) if callable(choice) else repr(choice)


def apply(
    axis: str, module: nn.Module, y: Activations, shape: tuple[int, ...] | None = None
) -> Activations:
    """Applies a module to one argument, and checks what it gives.

    Args:
      axis: of the module, for the message.
      module: a flax module.
      y: what it takes: computed, unless the module is `deferred`.
      shape: of the result; None: as of `y`.

    Raises:
      UserError: if it gives anything else.
    """
    if getattr(module, "deferred", False):
        return module(y)
    x = norm_ops.value(y)
    return checked(axis, module, x, module(x), x.shape if shape is None else shape)


def checked(
    axis: str, part: Any, x: jax.Array, out: Any, shape: tuple[int, ...] | None
) -> jax.Array:
    """`out`, in the dtype of `x`.

    Raises:
      UserError: if it is no array, or of another shape (None: has not four axes).
    """
    name = describe(type(part) if isinstance(part, nn.Module) else part)
    if not isinstance(out, jax.Array) or isinstance(out, Affine):
        raise UserError(f"{axis} {name} gives a {type(out).__name__}, not an array.")
    if out.ndim != 4 if shape is None else out.shape != shape:
        right = "[N, H, W, C]" if shape is None else list(shape)
        raise UserError(
            f"{axis} {name} makes {list(out.shape)} of {list(x.shape)}; it must give {right}."
        )
    return out.astype(x.dtype)
