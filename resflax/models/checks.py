"""What every family asks of its arguments; the messages say what would be right."""

from collections.abc import Collection, Iterable
from typing import Any

import flax.linen as nn


def listed(values: Iterable[Any]) -> str:
    """The values as they are written in code, with commas."""
    return ", ".join(map(repr, values))


def choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises ValueError if `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not one of {listed(choices)}.")


def choices(model: nn.Module, valid: dict[str, Collection[Any]]) -> None:
    """Raises ValueError if a field has not one of its values."""
    for name, values in valid.items():
        choice(name, getattr(model, name), values)


def positive(model: nn.Module, *names: str) -> None:
    """Raises ValueError if one of these fields is not a number of at least 1."""
    for name in names:
        if getattr(model, name) < 1:
            raise ValueError(f"{name} {getattr(model, name)} must be at least 1.")


def rates(model: nn.Module, *names: str) -> None:
    """Raises ValueError if one of these fields is not a probability below 1."""
    for name in names:
        if not 0.0 <= getattr(model, name) < 1.0:
            raise ValueError(f"{name} {getattr(model, name)} must be at least 0 and less than 1.")
