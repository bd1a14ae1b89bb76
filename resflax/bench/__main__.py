"""Times networks, beside peers: python -m resflax.bench --model se_resnext50_32x4d --peer timm."""

import argparse
import functools
import gc
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from resflax.bench import ours, peers, report, roofline
from resflax.bench.capacity import largest_batch
from resflax.bench.case import MODES, Case
from resflax.bench.rounds import Entry, measure
from resflax.errors import UserError
from resflax.models import count, create_model
from resflax.models.zoo import image_size
from resflax.process import runtime
from resflax.process.arguments import Parser, assignment, path_option, values


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what the command line asks for; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    options = parser.parse_args(argv)
    _prepare_jax(options.stock_process)
    console = report.Screen()
    load = report.load()
    try:
        _check(options)
        cases = list(_cases(options))
        if options.find_batch:
            _find_batches(cases, console)
            return 0
        contests = [(case, _entries(case, options)) for case in cases]
    except UserError as error:
        parser.error(str(error))
    if load > peers.cores() / 2:
        console.note(f"other programs are running: {load:.1f} in the last minute")
    peaks: dict[str, roofline.Peaks] = {}
    measurements = []
    for case, entries in contests:
        measurement = _measure(case, entries, options, peaks, console)
        measurements.append(measurement)
        if not options.markdown:
            console.table(measurement)
    if options.markdown:
        print(*report.markdown(measurements), sep="\n")
    else:
        console.explain(peaks)
    if options.json:
        command = shlex.join(["python", "-m", "resflax.bench", *argv])
        settings = {k: str(v) if k == "json" else v for k, v in vars(options).items()}
        written = report.document(measurements, peaks, command, settings, load)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(written, indent=2) + "\n")
    return int(any(not m.ours.seconds for m in measurements))


def _parser() -> Parser:
    parser = Parser(prog="python -m resflax.bench", description=__doc__.partition(":")[0] + ".")
    add = parser.add_argument
    add(
        "--model", action="append", required=True, metavar="NAME", help="a network; repeat for more"
    )
    add(
        "--set",
        action="append",
        type=assignment,
        default=[],
        metavar="ARG=VALUE",
        help="of them all: shortcut=A",
    )
    add("--size", type=int, metavar="PIXELS", help="side of the images; default: as published on")
    add("--batch", type=int, metavar="N", help="images in a step; default: 16 on a CPU, else 256")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--mode", choices=("train", "inference", "both"), default="both")
    add(
        "--peer",
        action="append",
        default=[],
        choices=sorted(peers.PACKAGES),
        help="repeat for more",
    )
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--repeats", type=int, default=5, metavar="N", help="rounds, 3 or more")
    add(
        "--steps", type=int, metavar="N", help="in a contender's turn; default: 1 on a CPU, else 10"
    )
    add(
        "--max-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="a contender whose first step takes longer is measured by it alone",
    )
    add("--stock-process", action="store_true", help="without what resflax.process.runtime sets")
    add("--find-batch", action="store_true", help="search the largest batch that trains; no timing")
    add("--json", type=path_option, metavar="FILE", help="write all that is measured")
    add("--markdown", action="store_true", help="print a table for a README")
    return parser


def _prepare_jax(stock: bool) -> None:
    """Sets the process up as for training, or, if `stock`, nearly as jax does."""
    # Else the compile time may be that of reading a file.
    jax.config.update("jax_enable_compilation_cache", False)
    if not stock:
        runtime.configure()
    # The memory of an accelerator is shared with torch; and its peak should be what is in use.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _check(options: argparse.Namespace) -> None:
    """Fills in the defaults that depend on the device; raises UserError for what cannot be."""
    on_cpu = jax.default_backend() == "cpu"
    options.batch = (16 if on_cpu else 256) if options.batch is None else options.batch
    options.steps = (1 if on_cpu else 10) if options.steps is None else options.steps
    for name, least in (("batch", 1), ("repeats", 3), ("steps", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)} must be at least {least}.")
    options.peer = list(dict.fromkeys(options.peer))
    for peer in options.peer:
        peers.check(peer)


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    overrides = values(options.set)
    modes = MODES if options.mode == "both" else (options.mode,)
    for name in options.model:
        model = create_model(name, **{"dtype": jnp.dtype(options.dtype), **overrides})
        size = image_size(name) if options.size is None else options.size
        # It says which sizes would have been right.
        count(model, (size, size, 3))
        # Inference first: the device remembers its highest peak of memory, which is training's.
        for mode in modes:
            yield Case(name, model, size, options.batch, mode)


def _entries(case: Case, options: argparse.Namespace) -> list[Entry]:
    entries = [Entry("resflax", "", functools.partial(ours.Contender, case))]
    for peer in options.peer:
        entries += peers.entries(case, peer, compiled=not options.no_compile)
    return entries


def _measure(
    case: Case,
    entries: list[Entry],
    options: argparse.Namespace,
    peaks: dict[str, roofline.Peaks],
    console: report.Screen,
) -> report.Measurement:
    with console.progress():
        results = measure(
            entries,
            repeats=options.repeats,
            steps=options.steps,
            max_seconds=options.max_seconds,
            tell=lambda text: console.tell(f"{case.name}, {case.mode}: {text}"),
        )
        _tear_down()
        dtype = case.dtype.name
        if dtype not in peaks:
            console.tell(f"the device's peaks in {dtype}")
            peaks[dtype] = roofline.measure_peaks(case.dtype, *_peak_sizes())
        return report.Measurement(case, roofline.bound(case, peaks[dtype]), results)


def _peak_sizes() -> tuple[int, int]:
    """Side of the matrices and bytes of the array that keep a device busy, but not for long."""
    return (1536, 2**27) if jax.default_backend() == "cpu" else (8192, 2**29)


def _tear_down() -> None:
    """Frees what the contenders of a case left."""
    jax.clear_caches()
    if "torch" in sys.modules:
        import torch

        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    gc.collect()


def _find_batches(cases: Sequence[Case], console: report.Screen) -> None:
    for case in {case.name: case for case in cases}.values():
        found = largest_batch(case, functools.partial(_note, console, case.name))
        print(f"{case.name}, images of {case.size} x {case.size}, {case.dtype.name}: {found}")


def _note(console: report.Screen, name: str, text: str) -> None:
    console.note(f"{name}, {text}")


if __name__ == "__main__":
    sys.exit(main())
