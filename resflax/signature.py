"""Constructors of what a config names: their keyword-only arguments are fields of the config.

An argument with a default is a field of the constructor's own, in the sub-group of its name; one
without is a field, or a part of the run, that several constructors share.
"""

import inspect
from collections.abc import Callable
from typing import Any

from resflax.errors import UserError


def own(constructor: Callable[..., Any]) -> dict[str, Any]:
    """The constructor's own fields and their defaults; None stands for no number."""
    arguments = _arguments(constructor)
    return {a.name: a.default for a in arguments if a.default is not a.empty}


def shared(constructor: Callable[..., Any]) -> list[str]:
    """The names of what the constructor takes that is not its own."""
    return [a.name for a in _arguments(constructor) if a.default is a.empty]


def require(low: float, high: float, **arguments: float) -> None:
    """Raises UserError for the first of the arguments that is not from `low` to `high`."""
    for name, value in arguments.items():
        if not low <= value <= high:
            raise UserError(f"{name} {value} must be from {low:g} to {high:g}.")


def _arguments(constructor: Callable[..., Any]) -> list[inspect.Parameter]:
    arguments = inspect.signature(constructor).parameters.values()
    return [a for a in arguments if a.kind is a.KEYWORD_ONLY]
