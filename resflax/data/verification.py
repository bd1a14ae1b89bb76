"""Reads every image of a data set, and says which cannot be read."""

import concurrent.futures

import ml_collections
import numpy as np
import rich.console
import rich.progress

from resflax.data import sources
from resflax.data.bad import BadImages

_BATCH = 32


def verify(config: ml_collections.ConfigDict) -> int:
    """Checks the data set of a config, with a progress bar.

    Args:
      config: of a run.

    Returns:
      The exit code: 0, or 1 if an image cannot be read.

    Raises:
      UserError: if there is no data set.
    """
    console = rich.console.Console(highlight=False)
    raw = sources.SOURCES[config.data.source](config.data)
    for line in raw.notes:
        console.print(line, markup=False, soft_wrap=True)
    stored = [part for part in (raw.train, raw.val, raw.test) if part is not None]
    total = sum(map(len, stored))
    bad = BadImages(total)
    size = sources.image_size(config.data)
    parts = [sources.readable(raw, part, config.data, size, bad) for part in stored]
    batches = [
        (part, np.arange(start, min(start + _BATCH, len(part))))
        for part in parts
        for start in range(0, len(part), _BATCH)
    ]
    counts = np.zeros(len(raw.label_names), np.int64)
    with (
        rich.progress.Progress(console=console, transient=True) as bar,
        concurrent.futures.ThreadPoolExecutor(config.data.threads or None) as pool,
    ):
        task = bar.add_task("images", total=total)
        for batch in pool.map(lambda b: b[0].test_batch(b[1]), batches):
            counts += np.bincount(batch["label"][batch["mask"] == 1], minlength=len(counts))
            bar.advance(task, len(batch["mask"]))
    for line in bad:
        console.print(line, markup=False, soft_wrap=True)
    console.print(
        f"{total - len(raw.test):,} training and {len(raw.test):,} test images, "
        f"{len(counts)} labels, {counts.min():,} to {counts.max():,} readable ones of each; "
        f"{len(bad)} of {total:,} cannot be read",
        soft_wrap=True,
    )
    return int(len(bad) > 0)
