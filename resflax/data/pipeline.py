"""The host's pipeline: shuffled batches for training, every image once for evaluation."""

import collections
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from resflax.data.sources import ArraySource

Batch = dict[str, np.ndarray]


class TrainBatches:
    """Endless training batches on the devices, two ahead, with a position that can be saved.

    Every epoch is a new permutation that depends on the seed and the epoch only; the images that
    do not fill its last batch are left out, other ones in each epoch.

    Attributes:
      steps_per_epoch: whole batches in the data set.
    """

    def __init__(
        self,
        source: ArraySource,
        *,
        batch_size: int,
        seed: int,
        put: Callable[[Batch], dict[str, jax.Array]],
        ahead: int = 2,
    ):
        """Sets up the pipeline; nothing is read yet.

        Args:
          source: of the examples.
          batch_size: over all processes; each reads its share.
          seed: of the order.
          put: lays a batch over the devices.
          ahead: batches on the devices that have not been asked for yet.

        Raises:
          ValueError: if there are fewer examples than a batch takes.
        """
        self.steps_per_epoch = len(source) // batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"train.batch_size {batch_size} is more than the {len(source)} training images."
            )
        dataset = (
            grain.MapDataset.source(source)
            .seed(seed)
            .shuffle()
            .batch(batch_size, drop_remainder=True)
            .map(_share)
            .repeat(None)
        )
        # One thread is enough for arrays in memory.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        self._iterator = iter(dataset.to_iter_dataset(options))
        self._put = put
        self._ahead = ahead
        self._queue: collections.deque[tuple[dict[str, jax.Array], dict[str, Any]]] = (
            collections.deque()
        )
        self._position = self._iterator.get_state()

    def __next__(self) -> dict[str, jax.Array]:
        while len(self._queue) <= self._ahead:
            batch = self._put(next(self._iterator))
            self._queue.append((batch, self._iterator.get_state()))
        batch, self._position = self._queue.popleft()
        return batch

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        return self

    @property
    def position(self) -> dict[str, Any]:
        """Where the batches given out so far end; JSON."""
        return self._position

    def seek(self, position: dict[str, Any]) -> None:
        """Goes on from a saved position: the next batch is the one that came after it."""
        self._queue.clear()
        self._iterator.set_state(position)
        self._position = position


def _share(batch: Batch) -> Batch:
    """The part of a batch that this process reads, with its mask."""
    size = len(batch["label"]) // jax.process_count()
    part = slice(jax.process_index() * size, (jax.process_index() + 1) * size)
    return {k: v[part] for k, v in batch.items()} | {"mask": np.ones(size, np.float32)}


def eval_batches(source: ArraySource, batch_size: int) -> Iterator[Batch]:
    """Batches that hold every example exactly once: the share of this process.

    The last batch is filled up with copies whose mask is 0; all processes get equally many.

    Args:
      source: of the examples, in their order.
      batch_size: over all processes.
    """
    share = batch_size // jax.process_count()
    for start in range(0, len(source), batch_size):
        first = start + jax.process_index() * share
        indices = np.arange(first, first + share)
        mask = indices < len(source)
        examples = [source[i] for i in np.minimum(indices, len(source) - 1)]
        yield {
            "image": np.stack([e["image"] for e in examples]),
            "label": np.stack([e["label"] for e in examples]),
            "mask": mask.astype(np.float32),
        }
