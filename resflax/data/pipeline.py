"""The order of the examples, and the batches that are on their way to the devices.

A batch is read by one thread, so that several are read at once, and one order serves images that
the host reads and those that live on the devices (see resflax.data.resident).
"""

import collections
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from resflax.data.examples import Batch, Source
from resflax.errors import UserError

# Seconds in which a batch that has been read is handed over.
_INSTANT = 1e-3

# Steps that no run takes.
_ENDLESS = 2**40

# A batch on the devices, as `put` lays it there.
Placed = dict[str, Any]

# From the indices of examples and a seed for each to a batch: see examples.Source.train_batch.
Read = Callable[[np.ndarray, np.ndarray], Batch]


class TrainBatches:
    """Endless training batches on the devices, some ahead, from any step on.

    Every epoch is a new permutation that depends on the seed and the epoch only; the images that
    do not fill its last batch are left out, other ones in each epoch.

    Attributes:
      steps_per_epoch: whole batches in the data set.
      step: steps whose batches were given out, or passed by `seek`.
      waited: whether the last call's batch was still to be read when it was asked for.
    """

    def __init__(
        self,
        num_examples: int,
        *,
        batch_size: int,
        seed: int,
        read: Read,
        put: Callable[[Batch, int], Placed],
        threads: int = 1,
        ahead: int = 2,
    ):
        """Sets up the pipeline; nothing is read yet.

        Args:
          num_examples: to train on.
          batch_size: over all processes; each reads its share.
          seed: of the order.
          read: makes a batch of indices and seeds.
          put: lays a batch over the devices, given the axis of its examples.
          threads: that read, a batch each; 0: who asks for a batch reads it.
          ahead: calls' batches on the devices that have not been asked for yet.

        Raises:
          UserError: if there are fewer examples than a batch takes.
        """
        self.steps_per_epoch = num_examples // batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"train.batch_size {batch_size} is more than the {num_examples} training images."
            )

        order = self._order = _Order(num_examples, batch_size, seed)

        def example_batch(step: int, rng: np.random.Generator) -> Batch:
            # Drawn for the whole batch, so that an image's do not depend on who reads it.
            seeds = rng.integers(2**63, size=batch_size)
            share = _share(batch_size)
            return read(order[step][share], seeds[share])

        self._batches = grain.MapDataset.range(_ENDLESS).seed(seed).random_map(example_batch)
        self._options = _options(threads)
        self._put = put
        self._ahead = ahead
        self.step = 0
        self.waited = False

    def take(self, counts: Iterable[int]) -> Iterator[tuple[int, Placed]]:
        """Goes on after `step`, call by call.

        Args:
          counts: of the steps in each call.

        Yields:
          The count and a batch, [N, ...]; where a call has several steps, theirs in one stack
          [count, N, ...] and one transfer.
        """
        batches = iter(self._batches[self.step :].to_iter_dataset(self._options))
        queue: collections.deque[tuple[int, Placed]] = collections.deque()
        for count in counts:
            queue.append((count, self._read(batches, count)))
            if len(queue) > self._ahead:
                yield self._give(queue)
        self.waited = False
        while queue:
            yield self._give(queue)

    def indices(self, step: int) -> list[int]:
        """The examples of a step's batch, over all processes; the first step is 1."""
        return self._order[step - 1].tolist()

    def seek(self, step: int) -> None:
        """Goes on, or back: the next batch is the one after so many steps."""
        self.step = step

    def _read(self, batches: Iterator[Batch], count: int) -> Placed:
        start = time.monotonic()
        read = list(itertools.islice(batches, count))
        self.waited = time.monotonic() - start > _INSTANT
        if count == 1:
            return self._put(read[0], 0)
        return self._put(jax.tree.map(lambda *arrays: np.stack(arrays), *read), 1)

    def _give(self, queue: collections.deque) -> tuple[int, Placed]:
        count, batch = queue.popleft()
        self.step += count
        return count, batch


class _Order:
    """The examples of each step's batch, from step 0 on; see TrainBatches.

    A whole epoch is drawn at once: numbers one by one, out of Python, would hold up small networks.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int):
        self._batch_size, self._steps = batch_size, num_examples // batch_size

        # Threads that read ahead are in the next epoch already.
        @functools.lru_cache(maxsize=2)
        def permutation(epoch: int) -> np.ndarray:
            return np.random.default_rng((seed, epoch)).permutation(num_examples)

        self._permutation = permutation

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, batch = divmod(step, self._steps)
        return self._permutation(epoch)[batch * self._batch_size :][: self._batch_size]


def eval_batches(source: Source, batch_size: int, threads: int = 1) -> Iterator[Batch]:
    """Batches that hold every example exactly once: the share of this process.

    The last batch is filled up with examples whose mask is 0; all processes get equally many.

    Args:
      source: of the examples, in their order.
      batch_size: over all processes.
      threads: that read, a batch each.
    """
    share = np.arange(batch_size)[_share(batch_size)]
    dataset = grain.MapDataset.range(0, len(source), batch_size).map(
        lambda start: source.test_batch(start + share)
    )
    return iter(dataset.to_iter_dataset(_options(threads)))


def _share(batch_size: int) -> slice:
    """The part of a batch that this process reads."""
    size = batch_size // jax.process_count()
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)


def _options(threads: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
