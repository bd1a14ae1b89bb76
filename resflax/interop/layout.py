"""A library's layout of a family of networks: what it calls our arrays, and what it does otherwise.

The same layout reads and writes. What the library's network computes otherwise than ours by default
is in `conventions`: arguments of our network, which reading sets and writing checks.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from resflax.interop import weights
from resflax.interop.weights import Entry, Transform, Variables

Shapes = Mapping[str, tuple[int, ...]]

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
      kernels: how kernels are arranged there, by the end of our module's path, where they are not
        those of plain convolutions and dense layers.
      renamed: a pattern of older names, and what to put in its place.
    """

    library: str
    mark: str
    place: Callable[[Any, str], str | None]
    conventions: Callable[[Any, Shapes], dict[str, Any]] = _none
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
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
            if place is not None:
                transform = weights.AS_IS
                if path[-1] == "kernel":
                    transform = self._kernel(module, len(leaf.shape))
                entries.append(Entry(path, f"{place}.{_ARRAYS[path[-1]]}", transform))
        return entries

    def _kernel(self, module: str, rank: int) -> Transform:
        special = (t for end, t in self.kernels.items() if f"/{module}".endswith(f"/{end}"))
        return next(special, _KERNELS[rank])

    def differences(self, model: nn.Module, shapes: Shapes) -> list[str]:
        """What the network computes otherwise than the library's."""
        chosen = self.conventions(model, shapes)
        differences = [
            f"{field} {getattr(model, field)!r} is {value!r} there"
            for field, value in chosen.items()
            if getattr(model, field) != value
        ]
        for field, known in self.fixed.items():
            values = known if isinstance(known, tuple) else (known,)
            if field not in chosen and getattr(model, field) not in values:
                listed = " or ".join(map(repr, values))
                differences.append(f"{field} {getattr(model, field)!r} is {listed} there")
        return differences


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
