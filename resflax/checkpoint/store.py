"""The checkpoints in a run's directory, as they lie on the disk."""

import contextlib
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from resflax import disk
from resflax.checkpoint import origin
from resflax.checkpoint.manifest import DamageError, Manifest
from resflax.errors import UserError
from resflax.run import workdir as workdir_lib

# Prefixes of the directory of a checkpoint that is not complete on the disk yet, or that is being
# deleted. Readers ignore such directories, whatever a kill or a power cut leaves in them.
UNFINISHED = "unfinished"
_DELETED = "deleted"

# Of a checkpoint that orbax has not finished, behind its step.
ORBAX_UNFINISHED = ".orbax-checkpoint-tmp"

_LEFTOVER = re.compile(
    rf"{_DELETED}_\d+|{UNFINISHED}_\d+|({UNFINISHED}_)?\d+{re.escape(ORBAX_UNFINISHED)}.*"
)

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


def configs(workdir: pathlib.Path) -> set[str]:
    """SHA-256 of the configs that a run's checkpoints were saved with, but for damaged ones."""
    found = set()
    for step in steps(workdir):
        with contextlib.suppress(DamageError):
            found |= origin.digests(Manifest.read(directory(workdir) / str(step)))
    return found


def best(metrics: Mapping[int, Mapping[str, float]]) -> int | None:
    """The step with the best evaluation, the latest of equals; None if none was finite.

    Args:
      metrics: of the evaluations of steps; empty where there was none.
    """
    qualities = {s: quality(m) for s, m in metrics.items() if BEST_METRIC in m}
    evaluated = [step for step in qualities if qualities[step] >= 0]
    return max(evaluated, key=lambda s: (qualities[s], s), default=None)


def kept(metrics: Mapping[int, Mapping[str, float]], keep: int) -> set[int]:
    """The steps to keep: the latest `keep`, and the best one (see `best`)."""
    steps = set(sorted(metrics)[-keep:])
    first = best(metrics)
    return steps if first is None else steps | {first}


def unfinished(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """Where the checkpoint of a step is until `finish`."""
    return directory(workdir) / f"{UNFINISHED}_{step}"


def finish(workdir: pathlib.Path, step: int) -> None:
    """Gives a complete checkpoint its name, and syncs it: after that it outlives a power cut.

    Args:
      workdir: of the run.
      step: of a checkpoint that is complete, and synced but for what orbax wrote last.

    Raises:
      OSError: if it cannot be; it keeps the name of an unfinished one.
    """
    path = unfinished(workdir, step)
    # What goes on from it has these lines behind it.
    with contextlib.suppress(OSError):
        disk.sync(workdir / workdir_lib.METRICS)
    for entry in (*path.iterdir(), path):
        disk.sync(entry)
    path.rename(directory(workdir) / str(step))
    disk.sync(directory(workdir))


def delete(workdir: pathlib.Path, step: int) -> None:
    """Deletes a checkpoint. After a kill in between, readers find it whole or not at all.

    Raises:
      OSError: if it cannot be deleted.
    """
    path = directory(workdir) / f"{_DELETED}_{step}"
    (directory(workdir) / str(step)).rename(path)
    disk.sync(directory(workdir))
    _remove(path)


def sweep(workdir: pathlib.Path, report: Callable[[str], None] = lambda text: None) -> None:
    """Removes the directories that interrupted saves and deletions have left.

    Args:
      workdir: of the run, which nobody else saves into.
      report: called with a line for each interrupted save.
    """
    for path in sorted(directory(workdir).glob("*")):
        if _LEFTOVER.fullmatch(path.name):
            if not path.name.startswith(_DELETED):
                report(f"{path} is removed: its save was interrupted.")
            # Readers ignore a directory that cannot be removed.
            with contextlib.suppress(OSError):
                _remove(path)


def _remove(path: pathlib.Path) -> None:
    if path.is_symlink():  # what it points at is not the run's to delete
        path.unlink()
    else:
        shutil.rmtree(path)


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

    What is left of saves and deletions that were interrupted is removed.

    Args:
      workdir: of the run.
      report: is told of each.
      run: see `read`.

    Raises:
      CheckpointError: if none there is can be used; nothing was moved.
    """
    sweep(workdir, report)
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
