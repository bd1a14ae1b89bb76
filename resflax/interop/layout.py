"""A library's layout of a family of networks: what it calls our arrays, and what it does otherwise.

The same layout reads and writes. What the library's network computes otherwise than ours by default
is in `conventions`: arguments of our network, which reading sets and writing checks. A field of our
network that a layout does not name must have its default: there may be no network there that
computes the same.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn

from resflax.interop import weights
from resflax.interop.weights import Entry, Transform, Variables
from resflax.models.constructors import title

Shapes = Mapping[str, tuple[int, ...]]

# Fields of networks of which no logits in evaluation depend, or that the arrays show.
NEUTRAL = frozenset(
    {
        "any_size", "aux_dropout", "axis_name", "bn_momentum", "dropout", "dropped", "dtype",
        "form", "kernel_init", "num_classes", "packed", "remat", "scan", "stage_sizes",
        "zero_init_last",
    }
)  # fmt: skip

# What a network does in training only, so that it may differ where weights are read.
RATES = frozenset({"drop_path", "drop_path_mode"})

# PyTorch's name for each array of a module.
_ARRAYS = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}

_KERNELS = {2: weights.LINEAR, 4: weights.CONV}


def _none(model: Any, shapes: Shapes) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one library lays out the weights of one of our families of networks.

    Attributes:
      library: its name.
      mark: an array that weights of this layout have, and the others of the family have not.
      place: the library's module for a module of ours, or None where it has none: `place(network,
        "stage2_block1/conv1")`.
      conventions: arguments of our network that make it the library's, given the network and the
        shapes of the library's arrays. Rates of dropout are not among them.
      fixed: other arguments, and the value that the library knows, or a tuple of those: a network
        with others has no counterpart there.
      free: arguments that may have any value, beside those in NEUTRAL: what the arrays show, or
        what has no effect where the others are as they are.
      kernels: how kernels are arranged there, by the end of our module's path, where they are not
        those of plain convolutions and dense layers.
      renamed: a pattern of older names, and what to put in its place.
    """

    library: str
    mark: str
    place: Callable[[Any, str], str | None]
    conventions: Callable[[Any, Shapes], dict[str, Any]] = _none
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    free: frozenset[str] = frozenset()
    kernels: Mapping[str, Transform] = dataclasses.field(default_factory=dict)
    renamed: tuple[str, str] | None = None

    def current(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays by their present names."""
        if self.renamed is None:
            return dict(arrays)
        pattern, new = self.renamed
        return {re.sub(pattern, new, key): array for key, array in arrays.items()}

    def kernel_key(self, model: nn.Module, module: str) -> str | None:
        """The library's name for the kernel of a module of ours."""
        place = self.place(model, module)
        return None if place is None else f"{place}.weight"

    def entries(self, model: nn.Module, template: Variables) -> list[Entry]:
        """Of those of the network's arrays for which the library has a place."""
        entries = []
        for path, leaf in weights.flatten(template).items():
            # Group norm has its arrays in a module of its own; see layers.GroupNorm.
            module = "/".join(path[1:-1]).removesuffix("/group")
            place = self.place(model, module)
            if place is not None and path[-1] in _ARRAYS:
                transform = weights.AS_IS
                if path[-1] == "kernel":
                    transform = self._kernel(module, len(leaf.shape))
                entries.append(Entry(path, f"{place}.{_ARRAYS[path[-1]]}", transform))
        return entries

    def _kernel(self, module: str, rank: int) -> Transform:
        special = (t for end, t in self.kernels.items() if f"/{module}".endswith(f"/{end}"))
        return next(special, _KERNELS[rank])

    def differences(self, model: nn.Module, shapes: Shapes) -> list[str]:
        """What a network that is not `unknown` computes otherwise than the library's."""
        return [
            f"{field} {getattr(model, field)!r} is {value!r} there"
            for field, value in self.conventions(model, shapes).items()
            if getattr(model, field) != value
        ]

    def unknown(self, model: nn.Module, but: Collection[str] = ()) -> list[str]:
        """What the library has no network for, whatever its conventions, `but` some fields."""
        found = []
        conventions = self.conventions(model, {})
        for field in dataclasses.fields(model):
            name, value = field.name, getattr(model, field.name)
            if name in {*NEUTRAL, *self.free, *but, "parent", "name"}:
                continue
            if name in conventions:
                if not callable(value):  # as parts from outside are
                    continue
                known = conventions[name]
            else:
                known = self.fixed.get(name, field.default)
            values = known if isinstance(known, tuple) else (known,)
            if value not in values:
                listed = " or ".join(map(repr, values))
                found.append(f"{name} {title(value)} is {listed} there")
        return found


@dataclasses.dataclass(frozen=True)
class Family:
    """The layouts in which a family of networks is known.

    Attributes:
      layouts: the first that fits is taken, reading and writing.
      stems: the module that sees the image; the first one that the network has.
      image_size: side of images that the network takes, pixels.
    """

    layouts: tuple[Layout, ...]
    stems: tuple[str, ...]
    image_size: int = 224
