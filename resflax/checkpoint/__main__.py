"""The checkpoints of runs: python -m resflax.checkpoint list|verify|prune DIR...

list shows them, verify reads every byte of them, prune deletes all but the latest and the best.
Exit code 0: all is well; 1: some are damaged; 2: bad input.
"""

import datetime
import pathlib
import sys
from collections.abc import Mapping, Sequence

import rich.console
import rich.progress
import rich.table

from resflax.checkpoint import store
from resflax.checkpoint.manifest import FILE, DamageError, Manifest
from resflax.process import command
from resflax.process.arguments import path_option
from resflax.run import lock


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the command line asks for; returns the exit code."""
    parser = command.Parser(prog="python -m resflax.checkpoint", allow_abbrev=False)
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, text in (
        ("list", "show the checkpoints"),
        ("verify", "read every byte, and name what is damaged"),
        ("prune", "delete all but the latest and the best; what is damaged stays"),
    ):
        task = tasks.add_parser(name, help=text, allow_abbrev=False)
        task.add_argument("directories", nargs="+", type=path_option, metavar="DIR")
        if name == "prune":
            task.add_argument("--keep", type=int, default=1, help="how many of the latest; 1")
    options = parser.parse_args(argv)
    console = rich.console.Console(highlight=False)
    for workdir in options.directories:
        if not store.steps(workdir):
            command.fail(
                f"{workdir} has no checkpoint: there is none in {store.directory(workdir)}."
            )
    if options.task == "list":
        return _list(options.directories, console)
    if options.task == "verify":
        return _verify(options.directories, console)
    if options.keep < 1:
        command.fail(f"--keep {options.keep} must be at least 1.")
    code = 0
    for workdir in options.directories:
        try:
            with lock.held(workdir):
                code = max(code, _prune(workdir, options.keep, console))
        except lock.LockError as error:
            command.fail(str(error))
    return code


def _list(workdirs: Sequence[pathlib.Path], console: rich.console.Console) -> int:
    code = 0
    for workdir in workdirs:
        manifests, damaged = _manifests(workdir)
        best = store.best(_metrics(manifests))
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=str(workdir), title_justify="left")
        table.add_column("step", justify="right")
        table.add_column("top-1", justify="right")
        table.add_column("MiB", justify="right")
        table.add_column("saved")
        table.add_column("by")
        for step, manifest in manifests.items():
            try:
                time = (store.directory(workdir) / str(step) / FILE).stat().st_mtime
            except FileNotFoundError:  # a run at work has deleted it
                continue
            versions, topology = (manifest.facts.get(k, {}) for k in ("versions", "topology"))
            table.add_row(
                str(step),
                _said(manifest.metrics) + (" best" if step == best else ""),
                f"{manifest.num_bytes / 2**20:,.1f}",
                datetime.datetime.fromtimestamp(time).isoformat(" ", "seconds"),
                f"jax {versions.get('jax', '?')}, {topology.get('devices', '?')} x "
                f"{topology.get('kind', '?')}",
            )
        console.print(table)
        for line in damaged:
            console.print(line, markup=False, soft_wrap=True)
            code = 1
    return code


def _said(metrics: Mapping[str, float]) -> str:
    """The top-1 of a step's evaluation, if there was one."""
    if store.BEST_METRIC not in metrics:
        return ""
    top1 = store.quality(metrics)
    return "not finite" if top1 < 0 else f"{top1:.2%}"


def _verify(workdirs: Sequence[pathlib.Path], console: rich.console.Console) -> int:
    steps = [(workdir, step) for workdir in workdirs for step in store.steps(workdir)]
    damaged = steps_gone = 0
    for workdir, step in rich.progress.track(
        steps, "verifying", console=console, transient=True, disable=not console.is_terminal
    ):
        checkpoint = store.directory(workdir) / str(step)
        try:
            manifest = store.verified(workdir, step)
        except DamageError as error:
            if not checkpoint.exists():  # a run at work has deleted it
                steps_gone += 1
                continue
            damaged += 1
            state = error.kind.removeprefix("is ").upper()
            console.print(f"{checkpoint}: {state}: {error}", markup=False, soft_wrap=True)
        else:
            size = f"{len(manifest.files)} files, {manifest.num_bytes / 2**20:,.1f} MiB"
            console.print(f"{checkpoint}: good, {size}", markup=False, soft_wrap=True)
    count = len(steps) - steps_gone
    console.print(f"{count - damaged} of {count} checkpoints are good")
    return 1 if damaged else 0


def _prune(workdir: pathlib.Path, keep: int, console: rich.console.Console) -> int:
    manifests, damaged = _manifests(workdir)
    kept = store.kept(_metrics(manifests), keep)
    for step, manifest in manifests.items():
        if step in kept:
            continue
        checkpoint = store.directory(workdir) / str(step)
        if strangers := manifest.strangers(checkpoint):
            damaged.append(f"step {step}: {checkpoint / strangers[0]} is not of the checkpoint.")
            continue
        store.delete(workdir, step)
        said = f"{workdir}: step {step} deleted, {manifest.num_bytes / 2**20:,.1f} MiB"
        console.print(said, markup=False, soft_wrap=True)
    for line in damaged:
        console.print(f"{line} It stays.", markup=False, soft_wrap=True)
    return 1 if damaged else 0


def _manifests(workdir: pathlib.Path) -> tuple[dict[int, Manifest], list[str]]:
    """Those of a run's checkpoints, by step; and what is wrong with the others."""
    manifests, damaged = {}, []
    for step in store.steps(workdir):
        try:
            manifests[step] = store.read(workdir, step)
        except DamageError as error:
            if not (store.directory(workdir) / str(step)).exists():
                continue  # a run at work has deleted it
            damaged.append(f"step {step} {error.kind}: {error}")
    return manifests, damaged


def _metrics(manifests: dict[int, Manifest]) -> dict[int, dict[str, float]]:
    return {step: manifest.metrics for step, manifest in manifests.items()}


if __name__ == "__main__":
    sys.exit(main())
