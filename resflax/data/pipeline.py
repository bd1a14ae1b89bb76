"""The host's pipeline: shuffled batches for training, every image once for evaluation."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from resflax.data.sources import ArraySource

Batch = dict[str, np.ndarray]


class TrainBatches:
    """Endless training batches on the devices, some ahead, with a position that can be saved.

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
        put: Callable[[Batch, int], dict[str, jax.Array]],
        ahead: int = 2,
    ):
        """Sets up the pipeline; nothing is read yet.

        Args:
          source: of the examples.
          batch_size: over all processes; each reads its share.
          seed: of the order.
          put: lays a batch over the devices, given the axis of its examples.
          ahead: calls' batches on the devices that have not been asked for yet.

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
        self._position = self._iterator.get_state()

    def take(self, counts: Iterable[int]) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        """Goes on from the position, call by call.

        Args:
          counts: of the steps in each call.

        Yields:
          The count and a batch, [N, ...]; where a call has several steps, theirs in one stack
          [count, N, ...] and one transfer.
        """
        self._iterator.set_state(self._position)
        queue: collections.deque[tuple[int, dict[str, jax.Array], dict[str, Any]]]
        queue = collections.deque()
        for count in counts:
            queue.append((count, self._read(count), self._iterator.get_state()))
            if len(queue) > self._ahead:
                yield self._give(queue)
        while queue:
            yield self._give(queue)

    @property
    def position(self) -> dict[str, Any]:
        """Where the batches given out so far end; JSON."""
        return self._position

    def seek(self, position: dict[str, Any]) -> None:
        """Sets a saved position: the next batch is the one that came after it."""
        self._position = position

    def _read(self, count: int) -> dict[str, jax.Array]:
        if count == 1:
            return self._put(next(self._iterator), 0)
        batches = [next(self._iterator) for _ in range(count)]
        return self._put(jax.tree.map(lambda *arrays: np.stack(arrays), *batches), 1)

    def _give(self, queue: collections.deque) -> tuple[int, dict[str, jax.Array]]:
        count, batch, self._position = queue.popleft()
        return count, batch


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
