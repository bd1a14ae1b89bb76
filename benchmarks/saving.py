"""Times what a checkpoint costs: the loop that it holds up, the writing, and its manifest.

python -m benchmarks.saving [--model NAME] [--repeats N] [--json FILE]

The state is that of SGD with momentum. The devices copy it before the next step, and the rest is
done while training goes on.
"""

import dataclasses
import functools
import json
import pathlib
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import jax
import optax
import rich.console
import rich.table
from absl import logging

from resflax import checkpoint
from resflax.bench import report
from resflax.checkpoint import store
from resflax.checkpoint.manifest import Manifest
from resflax.errors import UserError
from resflax.models import create_model
from resflax.process import runtime
from resflax.process.arguments import Parser, path_option
from resflax.train_state import TrainState, create_train_state


@dataclasses.dataclass(frozen=True)
class Save:
    """One save, in seconds.

    Attributes:
      held: the loop, until it could give the devices the next step.
      copying: of the devices, before that step, for a copy of the state and its checksums.
      total: until the checkpoint had its name.
      manifest: of that, reading all its files and writing the manifest.
      mebibytes: of the checkpoint.
    """

    held: float
    copying: float
    total: float
    manifest: float
    mebibytes: float


def saves(state: TrainState, folder: pathlib.Path, repeats: int) -> Iterator[Save]:
    """Saves a state, changed a little each time; the first one, which sets up, is left out."""

    @jax.jit
    def change(state: TrainState) -> TrainState:
        # Of a momentum of zeros a compressed file would have nothing.
        updates, opt_state = state.tx.update(state.params, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    saver = checkpoint.Checkpointer(folder, keep=1, facts=checkpoint.facts(""))
    for number in range(repeats + 1):
        state = jax.block_until_ready(change(state))
        start = time.perf_counter()
        saver.save(state, {"top1": 0.0})
        held = time.perf_counter() - start
        saver.wait()
        total = time.perf_counter() - start
        path = store.directory(folder) / str(int(state.step))
        manifest = Manifest.read(path)
        start = time.perf_counter()
        dataclasses.replace(manifest, files={}).write(path)
        again = time.perf_counter() - start
        start = time.perf_counter()
        jax.block_until_ready(checkpoint.snapshot(state))
        copying = time.perf_counter() - start
        if number:
            yield Save(held, copying, total, again, manifest.num_bytes / 2**20)
    saver.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what the command line asks for; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="python -m benchmarks.saving", description=__doc__.split(":")[0])
    parser.add_argument("--model", default="se_resnext50_32x4d", help="of resflax.list_models()")
    parser.add_argument("--repeats", type=int, default=7, help="saves; 7")
    parser.add_argument("--json", type=path_option, metavar="FILE", help="write the numbers")
    options = parser.parse_args(argv)
    if options.repeats < 3:
        parser.error(f"--repeats {options.repeats} must be at least 3.")
    try:
        model = create_model(options.model)
    except UserError as error:
        parser.error(str(error))
    init = functools.partial(
        create_train_state, model, optax.sgd(0.1, momentum=0.9), (224, 224, 3), ema=False
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = list(saves(jax.jit(init)(0), pathlib.Path(folder), options.repeats))
    medians = {
        field.name: statistics.median(getattr(row, field.name) for row in rows)
        for field in dataclasses.fields(Save)
    }
    _print(options.model, medians)
    if options.json:
        written = {
            "command": shlex.join(["python", "-m", "benchmarks.saving", *argv]),
            "machine": report.machine(),
            "versions": report.versions(),
            "model": options.model,
            "medians": medians,
            "saves": [dataclasses.asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    return 0


def _print(model: str, medians: dict[str, float]) -> None:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=model, title_justify="left")
    for name in (
        "loop held, ms",
        "devices, ms",
        "save, ms",
        "manifest, ms",
        "manifest / rest of the save",
        "MiB",
    ):
        table.add_column(name, justify="right")
    manifest, rest = medians["manifest"], medians["total"] - medians["manifest"]
    table.add_row(
        f"{1000 * medians['held']:,.0f}",
        f"{1000 * medians['copying']:,.0f}",
        f"{1000 * medians['total']:,.0f}",
        f"{1000 * manifest:,.0f}",
        f"{manifest / rest:.1%}",
        f"{medians['mebibytes']:,.0f}",
    )
    rich.console.Console(highlight=False).print(table)


if __name__ == "__main__":
    runtime.configure()
    logging.set_verbosity(logging.ERROR)  # orbax tells of every save
    sys.exit(main())
