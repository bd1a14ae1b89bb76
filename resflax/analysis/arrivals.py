"""Where activations and gates are seen: activations are functions, and no modules to ask.

They are seen where they arrive: what goes into the convolutions, and what passes between blocks.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from resflax.analysis.taps import Passed
from resflax.models import layers
from resflax.models.gates import Gate
from resflax.models.skips import Gating

_GATES = "gates of "


def select(module: nn.Module, method: str) -> str | None:
    """Selects what `activations` and `gates` look at: see taps.Select."""
    name = "/".join(module.path)
    if isinstance(module, Gate | Gating) and method == "gates":
        return _GATES + name
    inner = isinstance(module, layers.Conv) and not isinstance(module.parent, Gate)
    chosen = len(module.path) == 1 or inner
    return name if chosen and method == "__call__" else None


def blocks(names: Sequence[str], parameters: dict[str, object]) -> list[str]:
    """Of selected names, the blocks with layers: the parts of a network but its norm and head."""
    return [n for n in names if n in parameters and n not in ("norm", "head")]


def activations(found: dict[str, Passed], blocks: Sequence[str]) -> dict[str, dict[str, jax.Array]]:
    """What may come from an activation, by block and by place; no array is there twice.

    Args:
      found: what passed while the network was traced.
      blocks: in order.

    Returns:
      The places of a block: the names of the convolutions that read what it computes, then 'output'
      and 'after', what the next one takes in. If its output is activated, the latter is its pool.
    """
    # The arrays of a traced function are told apart by which objects they are.
    seen: set[int] = set()
    places: dict[str, dict[str, jax.Array]] = {}
    for block, following in zip(blocks, [*blocks[1:], "head"], strict=True):
        seen.add(id(found[block].input))
        arrived = {n: p.input for n, p in found.items() if n.startswith(f"{block}/")}
        output, after = found[block].output, found[following].input
        if after.ndim == 2 and output.ndim == 4 and following != "head":
            # Maps that a dense layer takes as one row are put together again.
            after = after.reshape(len(after), -1, output.shape[-1])
        arrived |= {"output": output, "after": after}
        places[block] = {}
        for place, x in arrived.items():
            if id(x) not in seen:
                places[block][place] = x
                seen.add(id(x))
    return places


def gates(found: dict[str, Passed], block: str) -> dict[str, jax.Array]:
    """The gates in a block: of squeeze-excite, and g where 1 - g scales the shortcut.

    For the latter see Identity Mappings, arXiv 1603.05027, Section 3.1.
    """
    return {n: p.output for n, p in found.items() if n.startswith(f"{_GATES}{block}/")}
