"""The checkpoints in a run's directory, as they lie on the disk."""

import math
import pathlib
from collections.abc import Callable, Iterator, Mapping

from resflax import workdir as workdir_lib
from resflax.checkpoint.manifest import DamageError, Manifest
from resflax.errors import UserError

# Of a checkpoint that orbax has not finished, behind its step.
UNFINISHED = ".orbax-checkpoint-tmp"

# Where damaged ones are put, in the run's directory: nothing is deleted that may be of use.
SET_ASIDE = "damaged_checkpoints"

BEST_METRIC = "top1"


class CheckpointError(UserError):
    """There is no such checkpoint, or it cannot be used; the message says which there are."""


def directory(workdir: pathlib.Path) -> pathlib.Path:
    """Where a run's checkpoints are, each in a directory named after its step."""
    return workdir / workdir_lib.CHECKPOINTS


def steps(workdir: pathlib.Path) -> list[int]:
    """Those that a run has checkpoints of, in order; some may be damaged."""
    names = [path.name for path in directory(workdir).glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def quality(metrics: Mapping[str, float]) -> float:
    """The number by which evaluations are compared: top-1; -1 where one of them is not finite."""
    finite = all(math.isfinite(value) for value in metrics.values())
    return metrics[BEST_METRIC] if finite else -1.0


def best(manifests: dict[int, Manifest]) -> int | None:
    """The step with the best evaluation, the latest of equals; None if none is finite."""
    qualities = {s: quality(m.metrics) for s, m in manifests.items() if BEST_METRIC in m.metrics}
    evaluated = [step for step in qualities if qualities[step] >= 0]
    return max(evaluated, key=lambda s: (qualities[s], s), default=None)


def newest_first(
    workdir: pathlib.Path, report: Callable[[str], None], item: str = ""
) -> Iterator[tuple[int, Manifest]]:
    """The checkpoints that are what was saved, verified one by one as they are asked for.

    Args:
      workdir: of the run.
      report: is told of each that is not.
      item: see Manifest.verify.
    """
    for step in reversed(steps(workdir)):
        try:
            yield step, Manifest.verify(directory(workdir) / str(step), item)
        except DamageError as error:
            report(f"the checkpoint of step {step} is damaged: {error}")


def tidy(workdir: pathlib.Path, report: Callable[[str], None]) -> None:
    """Makes a run's checkpoints what may be gone on from: damaged ones are set aside.

    Of a save that was interrupted, orbax removes what is left when it opens the directory.

    Args:
      workdir: of the run.
      report: is told of each.

    Raises:
      CheckpointError: if all there are are damaged; nothing was moved.
    """
    for path in sorted(directory(workdir).glob(f"*{UNFINISHED}*")):
        report(f"{path} is removed: its save was interrupted.")
    remarks: list[str] = []
    found = steps(workdir)
    good = [step for step, _ in newest_first(workdir, remarks.append)]
    if found and not good:
        raise CheckpointError(
            f"all checkpoints in {directory(workdir)} are damaged: {' '.join(remarks)} Put back "
            "a copy of one, or take another --workdir to start anew."
        )
    damaged = [step for step in reversed(found) if step not in good]
    for step, remark in zip(damaged, remarks, strict=True):
        place = _free(workdir / SET_ASIDE / str(step))
        place.parent.mkdir(exist_ok=True)
        (directory(workdir) / str(step)).rename(place)
        report(f"{remark} It was moved to {place}; the run has step {good[0]}.")


def _free(path: pathlib.Path) -> pathlib.Path:
    """The path, or one with a number behind it where something is there."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
