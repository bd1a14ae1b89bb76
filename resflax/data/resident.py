"""Data sets that live on the devices: batches are gathered there, and the host sends indices.

The order is that of resflax.data.pipeline, and the augmentation that of every step.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from resflax.data.examples import ArraySource, Batch, Source
from resflax.errors import UserError

Examples = dict[str, jax.Array]

# The share of an accelerator's memory, and the bytes of the host's, that a data set may take.
_DEVICE_SHARE = 0.25
_HOST_BYTES = 2 << 30


PLACEMENTS = ("auto", "device", "host")


def wanted(placement: str, source: Source) -> bool:
    """Whether the data set is to live on the devices.

    Args:
      placement: 'device', 'host', or 'auto': where there is room for a copy on each device, beside
        what training needs.
      source: of the examples.

    Raises:
      UserError: if it cannot, and must.
    """
    if not isinstance(source, ArraySource):
        if placement == "device":
            raise UserError(
                "config.data.placement 'device' is for images in memory: set config.data.crop of "
                "files to 'center', or the placement to 'host'."
            )
        return False
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit", 0) * _DEVICE_SHARE or _HOST_BYTES
    return placement == "device" or (placement == "auto" and source.images.nbytes <= limit)


def arrays(source: Source) -> Batch:
    """All examples of a source that is `wanted` on the devices, to be laid there."""
    assert isinstance(source, ArraySource)
    return {"image": np.asarray(source.images), "label": np.asarray(source.labels)}


def read(indices: np.ndarray, seeds: np.ndarray) -> Batch:
    """What the host sends of a batch: see pipeline.TrainBatches."""
    return {"index": indices.astype(np.int32)}


def gather(batch: Examples, resident: Examples) -> Examples:
    """The examples of a batch of indices, on the device."""
    return {name: array[batch["index"]] for name, array in resident.items()}


def gathering(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step from a state, a batch of indices, the examples and others, out of one without them."""

    def gathered(state: Any, batch: Examples, examples: Examples, *others: Any) -> Any:
        return step(state, gather(batch, examples), *others)

    return gathered
