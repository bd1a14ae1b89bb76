"""What passes through the methods of a network's modules, read or changed without changing them.

A method is picked by a `Select`: from a module and the method's name to a name for what is found
there, or None. Loops over equal blocks are to be written out first: see `written_out`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from resflax.models.interception import intercepted
from resflax.ops import norm

Select = Callable[[nn.Module, str], str | None]

# From a name, the method and what it is called with, to what takes the place of its result.
Edit = Callable[..., Any]


class Passed(NamedTuple):
    """What went into a method, its first argument, and what came out."""

    input: jax.Array
    output: jax.Array


def written_out(model: nn.Module) -> nn.Module:
    """The same network without loops over equal blocks; its variables are the same."""
    fields: dict[str, Any] = {"scan": 0, "remat": False}
    return model.clone(**{k: v for k, v in fields.items() if hasattr(model, k)})


def parts(module: nn.Module, method: str) -> str | None:
    """Selects the blocks: all that a network calls itself, but its last norm and its classifier."""
    if method != "__call__" or len(module.path) != 1 or isinstance(module, nn.Dropout):
        return None
    (name,) = module.path
    return None if name in ("head", "norm") else name


def recorded(apply: Callable[..., Any], select: Select) -> Callable[..., Any]:
    """A function that returns the result of `apply`, and what passed, by name, in order of use.

    Of a method that is called more than once, the last call counts. What a norm left to be computed
    (see ops.norm) is given computed.
    """

    def call(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Passed]]:
        found: dict[str, Passed] = {}

        def note(name: str, method: Callable[..., Any], x: Any, *rest: Any, **settings: Any) -> Any:
            result = method(x, *rest, **settings)
            found[name] = Passed(norm.value(x), norm.value(result))
            return result

        return edited(apply, select, note)(*args, **kwargs), found

    return call


def shapes(apply: Callable[..., Any], select: Select) -> Callable[[Any, Any], dict[str, Passed]]:
    """The shapes of what passes, in order of use, which a jitted function's dictionaries forget.

    Returns:
      From variables and images to them; traced once for images of one shape.
    """
    known: dict[Any, dict[str, Passed]] = {}

    def call(variables: Any, images: Any) -> dict[str, Passed]:
        key = images.shape, images.dtype
        if key not in known:
            order: list[str] = []

            def run(variables: Any, images: Any) -> dict[str, Passed]:
                _, found = recorded(apply, select)(variables, images)
                order.extend(found)
                return found

            found = jax.eval_shape(run, variables, images)
            known[key] = {name: found[name] for name in order}
        return known[key]

    return call


def edited(apply: Callable[..., Any], select: Select, edit: Edit) -> Callable[..., Any]:
    """`apply`, where edit(name, method, *arguments) takes the place of the selected methods."""

    def call(*args: Any, **kwargs: Any) -> Any:
        def intercept(
            method: Callable[..., Any],
            arguments: tuple[Any, ...],
            settings: dict[str, Any],
            context: nn.module.InterceptorContext,
        ) -> Any:
            name = select(context.module, context.method_name)
            if name is None:
                return method(*arguments, **settings)
            return edit(name, method, *arguments, **settings)

        with intercepted(intercept):
            return apply(*args, **kwargs)

    return call
