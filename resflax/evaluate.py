"""Exact evaluation of a data set: every image counts once."""

from collections.abc import Callable

import jax

from resflax.data import pipeline
from resflax.data.sources import ArraySource
from resflax.parallel import DataParallel
from resflax.train_state import TrainState


def evaluate(
    eval_step: Callable[..., dict[str, jax.Array]],
    state: TrainState,
    source: ArraySource,
    *,
    batch_size: int,
    parallel: DataParallel,
) -> dict[str, float]:
    """Evaluates a state on all examples of a source.

    Args:
      eval_step: steps.eval_step over the devices.
      state: on the devices.
      source: of the examples.
      batch_size: over all processes and devices.
      parallel: how batches are laid over them.

    Returns:
      'loss' (nats), 'top1' and 'top5' (fractions), means over the examples.
    """
    sums: list[dict[str, jax.Array]] = [
        eval_step(state, parallel.put(batch)) for batch in pipeline.eval_batches(source, batch_size)
    ]
    # Added on the host, in double precision, after all batches have been dispatched.
    fetched = [parallel.fetch(batch) for batch in sums]
    total = {k: sum(batch[k] for batch in fetched) for k in fetched[0]}
    count = total.pop("count")
    return {k: value / count for k, value in total.items()}
