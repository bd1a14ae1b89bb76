"""What every family asks of its arguments; the messages say what would be right."""

import numbers
import types
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import flax.linen as nn

from resflax.errors import UserError

# Of an argument's type, what a value may be an instance of.
_ACCEPTED = {bool: numbers.Integral, int: numbers.Integral, float: numbers.Real}

# More than any network has of anything; without a limit, a slip takes all memory.
_MOST = 2**16


def typed(name: str, value: Any, hint: Any) -> None:
    """Raises UserError if a value has not the type of its argument, or is no number to work with.

    Args:
      name: of the argument.
      value: of it.
      hint: its annotation; of types other than numbers, texts, sequences and None, all is taken.
    """
    union = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [typing.get_origin(part) or part for part in union]
    known = (bool, int, float, str, Sequence, Callable, type(None))
    if not all(kind in known for kind in kinds):
        return
    if not any(_is(value, kind) for kind in kinds):
        names = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise UserError(f"{name} {value!r} must be of type {names}.")
    if _is(value, float) and not -_MOST <= value <= _MOST:
        raise UserError(f"{name} {value} must be a finite number, of at most {_MOST:,}.")


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str)
    return isinstance(value, _ACCEPTED.get(kind, kind))


def listed(values: Iterable[Any]) -> str:
    """The values as they are written in code, with commas."""
    return ", ".join(map(repr, values))


def choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises UserError if `value` is not one of `choices`."""
    if value not in choices:
        raise UserError(f"{name} {value!r} is not one of {listed(choices)}.")


def choices(model: nn.Module, valid: dict[str, Collection[Any]]) -> None:
    """Raises UserError if a field has not one of its values."""
    for name, values in valid.items():
        choice(name, getattr(model, name), values)


def positive(model: nn.Module, *names: str) -> None:
    """Raises UserError if one of these fields is not a number of at least 1."""
    for name in names:
        if getattr(model, name) < 1:
            raise UserError(f"{name} {getattr(model, name)} must be at least 1.")


def rates(model: nn.Module, *names: str) -> None:
    """Raises UserError if one of these fields is not a probability below 1."""
    for name in names:
        if not 0.0 <= getattr(model, name) < 1.0:
            raise UserError(f"{name} {getattr(model, name)} must be at least 0 and less than 1.")


def image_size(stem: str, sides: tuple[int, ...], *, any_size: bool) -> None:
    """Raises UserError if images have not a size that the stem was made for.

    Args:
      stem: 'imagenet' and 'deep' leave a sixteenth of the pixels, 'cifar' all.
      sides: height and width of the images.
      any_size: whether every size is meant.
    """
    shape = " x ".join(map(str, sides))
    if min(sides) < 1:
        raise UserError(f"images of {shape} pixels have none.")
    if any_size:
        return
    if stem == "cifar" and max(sides) > 128:
        raise UserError(
            f"images of {shape} pixels are large for the stem 'cifar', which keeps every pixel: "
            "stem='imagenet' is for 64 and more; with any_size=True they are taken all the same."
        )
    if stem != "cifar" and min(sides) < 64:
        raise UserError(
            f"images of {shape} pixels are small for the stem {stem!r}, which leaves a sixteenth "
            "of them: stem='cifar' is for up to 128; with any_size=True they are taken all the "
            "same."
        )
