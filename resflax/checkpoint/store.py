"""The checkpoints in a run's directory, as they lie on the disk."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from resflax import workdir as workdir_lib
from resflax.checkpoint import origin
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


def best(manifests: dict[int, Manifest]) -> int | None:
    """The step with the best evaluation, the latest of equals; None if there was none."""
    evaluated = [step for step in manifests if BEST_METRIC in manifests[step].metrics]
    return max(evaluated, key=lambda s: (manifests[s].metrics[BEST_METRIC], s), default=None)


def read(workdir: pathlib.Path, step: int, run: dict[str, Any] | None = None) -> Manifest:
    """The manifest of a step's checkpoint, whose files are not looked at.

    Args:
      workdir: of the run.
      step: of the checkpoint.
      run: that the checkpoint must be of: see origin.of_run; None: any.

    Raises:
      DamageError: if it has none, a damaged one, or one of another step or run.
    """
    manifest = Manifest.read(directory(workdir) / str(step))
    origin.require(manifest, step, run)
    return manifest


def verified(
    workdir: pathlib.Path, step: int, item: str = "", run: dict[str, Any] | None = None
) -> Manifest:
    """The manifest of a step's checkpoint, each of whose files is as it was written.

    Args:
      workdir: of the run.
      step: of the checkpoint.
      item: see Manifest.verify.
      run: see `read`.

    Raises:
      DamageError: if one is not, or the checkpoint is of another step or run.
    """
    read(workdir, step, run)
    return Manifest.verify(directory(workdir) / str(step), item)


def newest_first(
    workdir: pathlib.Path,
    report: Callable[[str], None],
    item: str = "",
    run: dict[str, Any] | None = None,
) -> Iterator[tuple[int, Manifest]]:
    """The checkpoints that are what was saved, verified one by one as they are asked for.

    Args:
      workdir: of the run.
      report: is told of each that is not.
      item: see Manifest.verify.
      run: see `read`.
    """
    for step in reversed(steps(workdir)):
        try:
            yield step, verified(workdir, step, item, run)
        except DamageError as error:
            if not (directory(workdir) / str(step)).exists():
                continue  # deleted meanwhile, by a run at work
            report(f"the checkpoint of step {step} {error.kind}: {error}")


def none_left(workdir: pathlib.Path, remarks: list[str]) -> str:
    """The sentence where no checkpoint can be used, with what is wrong with each."""
    if any(f" {origin.StrangerError.kind}: " in remark for remark in remarks):
        return f"no checkpoint in {directory(workdir)} is whole and this run's: {' '.join(remarks)}"
    return f"all checkpoints in {directory(workdir)} are damaged: {' '.join(remarks)}"


def tidy(
    workdir: pathlib.Path, report: Callable[[str], None], run: dict[str, Any] | None = None
) -> None:
    """Makes a run's checkpoints what may be gone on from: damaged and strange ones are set aside.

    Of a save that was interrupted, orbax removes what is left when it opens the directory.

    Args:
      workdir: of the run.
      report: is told of each.
      run: see `read`.

    Raises:
      CheckpointError: if none there is can be used; nothing was moved.
    """
    for path in sorted(directory(workdir).glob(f"*{UNFINISHED}*")):
        report(f"{path} is removed: its save was interrupted.")
    remarks: list[str] = []
    found = steps(workdir)
    manifests = dict(newest_first(workdir, remarks.append, run=run))
    good = list(manifests)
    if found and not good:
        raise CheckpointError(
            f"{none_left(workdir, remarks)} Put back a copy of one, or take another --workdir to "
            "start anew."
        )
    if run and good and (doubt := origin.doubt(manifests[good[0]], workdir)):
        report(doubt)
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
