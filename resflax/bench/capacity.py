"""The largest batch whose training step fits a device's memory."""

import dataclasses
import pathlib
from collections.abc import Callable

import jax

from resflax.bench import ours
from resflax.bench.case import Case
from resflax.errors import UserError

# A batch that is known to within a sixteenth is known well enough.
_PRECISION = 16

_MEMINFO = pathlib.Path("/proc/meminfo")


def largest_batch(case: Case, tell: Callable[[str], None]) -> int:
    """The largest batch that fits, to within a sixteenth; 0 if not even one image does.

    On an accelerator a batch fits that runs. On a CPU, whose system may end a process that asks for
    too much, one fits whose compiled step says that it needs no more than what is available.

    Args:
      case: its batch is where the search begins.
      tell: is told of every try.
    """
    if jax.default_backend() != "cpu":
        return search(lambda batch: _runs(_of(case, batch), tell), case.batch)
    available = available_bytes()
    return search(lambda batch: _analysed(_of(case, batch), available, tell), case.batch)


def search(fits: Callable[[int], bool], start: int) -> int:
    """The largest batch that fits: doubled or halved from `start`, then bisected.

    Args:
      fits: whether a batch does; if so, all smaller ones do.
      start: the first to be tried, at least 1.
    """
    if fits(start):
        low, high = start, 2 * start
        while fits(high):
            low, high = high, 2 * high
    else:
        low, high = start // 2, start
        while low and not fits(low):
            low, high = low // 2, low
    while high - low > max(1, low // _PRECISION):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def available_bytes() -> int:
    """The host's memory that programs may still take.

    Raises:
      UserError: where the system does not say.
    """
    if not _MEMINFO.exists():
        raise UserError(f"--find-batch on a CPU reads {_MEMINFO}, which is not there.")
    lines = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _of(case: Case, batch: int) -> Case:
    return dataclasses.replace(case, batch=batch, mode="train")


def _runs(case: Case, tell: Callable[[str], None]) -> bool:
    try:
        ours.Contender(case).run(1)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        tell(f"batch {case.batch}: does not fit")
        return False
    tell(f"batch {case.batch}: runs")
    return True


def _analysed(case: Case, available: int, tell: Callable[[str], None]) -> bool:
    compiled = ours.step_function(case).lower(*ours.abstract_arguments(case)).compile()
    needed = ours.analysed_bytes(compiled)
    if needed is None:
        raise UserError("--find-batch: this compiler does not say how much memory a step needs.")
    fits = needed <= available
    sizes = f"{needed / 2**30:.2f} GiB of {available / 2**30:.2f} available"
    tell(f"batch {case.batch}: {sizes}, {'fits' if fits else 'does not fit'}")
    return fits
