"""What was measured, as a table of the terminal, as Markdown and as JSON."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import math
import os
import pathlib
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import rich.box
import rich.console
import rich.live
import rich.table
import rich.text

from resflax.bench import ours, peers
from resflax.bench.case import Case
from resflax.bench.roofline import Peaks
from resflax.bench.rounds import Ratio, Result, ratio

# Of the tables where there is no terminal that would have one, characters.
_PLAIN_WIDTH = 140

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "torch", "torchvision", "timm")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A case and what came of it.

    Attributes:
      case: what was measured.
      bound: seconds of a step by the roofline.
      results: of all contenders, ours first.
    """

    case: Case
    bound: float
    results: Sequence[Result]

    @property
    def ours(self) -> Result:
        """Our own result."""
        return self.results[0]

    def ratio(self, result: Result) -> Ratio | None:
        """Of a contender's time to ours, where both ran."""
        if result is self.ours or not result.seconds or not self.ours.seconds:
            return None
        return ratio(self.ours, result)

    def fastest(self) -> dict[str, Result]:
        """The form of each peer with the least ratio, of those that ran."""
        best: dict[str, tuple[float, Result]] = {}
        for result in self.results[1:]:
            found = self.ratio(result)
            if found and found.median < best.get(result.peer, (math.inf,))[0]:
                best[result.peer] = found.median, result
        return {peer: result for peer, (_, result) in best.items()}


class Screen:
    """Prints results to the standard output; what goes on meanwhile to the standard error."""

    # Seconds between two lines about the progress where none can change.
    PLAIN_INTERVAL = 15.0

    def __init__(self) -> None:
        self._last_line = -math.inf
        self._errors = rich.console.Console(stderr=True, highlight=False)
        self._live: rich.live.Live | None = None

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Shows a line that changes, where there is a terminal."""
        if not self._errors.is_terminal:
            yield
            return
        # Nothing is drawn but when told: a thread that draws would disturb the measurement.
        with rich.live.Live(console=self._errors, auto_refresh=False, transient=True) as live:
            self._live = live
            yield
        self._live = None

    def tell(self, text: str) -> None:
        """Says what goes on now: in the changing line, or once in a while in one of its own."""
        if self._live is not None:
            self._live.update(rich.text.Text(text, overflow="ellipsis", no_wrap=True), refresh=True)
        elif time.monotonic() - self._last_line > self.PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            self.note(text)

    def explain(self, peaks: Mapping[str, Peaks]) -> None:
        """What the tables' words mean, and the machine."""
        console = rich.console.Console(highlight=False)
        of = "; ".join(
            f"{found.flops / 1e9:,.0f} GFLOP/s in {dtype} and {found.bandwidth / 1e9:,.1f} GB/s"
            for dtype, found in peaks.items()
        )
        where = machine()
        lines = (
            f"device: {where['device']} (host: {where['cpu']}, {where['cores']} cores)",
            f"roofline: the model of resflax.bench.roofline at {of}, as measured here",
            "memory: peak on the device, or analysis of the compiled step (arguments, results, "
            "temporaries)",
        )
        for line in lines:
            console.print(line, style="dim", soft_wrap=True, markup=False)

    def note(self, text: str) -> None:
        """A line that stays, above the one that changes."""
        self._errors.print(text, soft_wrap=True, markup=False)

    def table(self, measurement: Measurement) -> None:
        """A table of the contenders, and a line about the fastest form of each peer."""
        console = rich.console.Console(highlight=False)
        if not console.is_terminal:
            console.width = _PLAIN_WIDTH
        console.print(_table(measurement))
        for line in verdicts(measurement):
            console.print(line, soft_wrap=True, markup=False)


def _table(measurement: Measurement) -> rich.table.Table:
    case = measurement.case
    title = f"{case.name}, {case.mode}, {case.batch} images of {case.size} x {case.size}, "
    table = rich.table.Table(
        title=title + case.dtype.name,
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        title_style="bold",
    )
    table.add_column("", no_wrap=True)
    for heading in (
        "images/s",
        "ms/step",
        "time / ours",
        "of roofline",
        "trace, s",
        "compile, s",
        "memory",
    ):
        table.add_column(heading, justify="right")
    for result in measurement.results:
        name = f"{result.peer} {result.form}".rstrip()
        if result.failure:
            table.add_row(name, "failed", style="dim")
            continue
        style = "bold" if result is measurement.ours else None
        table.add_row(name, *_cells(measurement, result), style=style)
    return table


def _cells(measurement: Measurement, result: Result) -> Iterator[str]:
    yield f"{measurement.case.batch / result.median:,.1f}"
    yield f"{1000 * result.median:,.1f}" + (" (once)" if result.single else "")
    yield spread(measurement.ratio(result))
    yield f"{measurement.bound / result.median:.0%}"
    for seconds in (result.costs.trace_seconds, result.costs.compile_seconds):
        yield "" if seconds is None else f"{seconds:.1f}"
    yield memory(result)


def spread(value: Ratio | None) -> str:
    """A ratio with its quartiles, '1.83 [1.80, 1.88]', or of one measurement, '48.10 (once)'."""
    if value is None:
        return ""
    if value.lower is None:
        return f"{value.median:.2f} (once)"
    return f"{value.median:.2f} [{value.lower:.2f}, {value.upper:.2f}]"


def memory(result: Result) -> str:
    """The device's peak where it is known, else the analysis of the compiled step."""
    for source in (ours.PEAK, ours.ANALYSIS):
        if source in result.costs.memory:
            return f"{result.costs.memory[source] / 2**20:,.0f} MiB ({source})"
    return ""


def verdicts(measurement: Measurement) -> Iterator[str]:
    """A line about the fastest form of each peer, and about what failed."""
    for peer, result in measurement.fastest().items():
        value = measurement.ratio(result)
        if value is not None:
            form = f" ({result.form})" if result.form else ""
            yield f"{peer}{form} takes {spread(value)} times as long as resflax"
    for result in measurement.results:
        if result.failure:
            yield f"{result.peer} {result.form}".rstrip() + f" failed: {result.failure}"


def markdown(measurements: Sequence[Measurement]) -> Iterator[str]:
    """A table with a line for each case, and the fastest form of each peer."""
    others = list(dict.fromkeys(peer for m in measurements for peer in m.fastest()))
    headings = ["network", "step", "batch", "images/s", "ms", "of roofline", "compile, s", "memory"]
    for peer in others:
        headings += [f"{peer}, images/s", f"{peer}'s time / ours"]
    yield f"| {' | '.join(headings)} |"
    yield f"|---|---|---|{'---:|' * (len(headings) - 3)}"
    for m in measurements:
        case = m.case
        cells = [f"`{case.name}`", case.mode, f"{case.batch} x {case.size}², {case.dtype.name}"]
        cells += _own_cells(m)
        for peer in others:
            cells += _peer_cells(m, m.fastest().get(peer))
        yield f"| {' | '.join(cells)} |"


def _own_cells(m: Measurement) -> list[str]:
    if not m.ours.seconds:
        return ["failed", "", "", "", ""]
    rate, milliseconds, _, share, _, compiling, needed = _cells(m, m.ours)
    return [rate, milliseconds, share, compiling, needed]


def _peer_cells(m: Measurement, result: Result | None) -> list[str]:
    if result is None:
        return ["", ""]
    form = f" ({result.form})" if result.form else ""
    return [f"{m.case.batch / result.median:,.1f}{form}", spread(m.ratio(result))]


def document(
    measurements: Sequence[Measurement],
    peaks: Mapping[str, Peaks],
    command: str,
    settings: dict[str, Any],
    load_before: float,
) -> dict[str, Any]:
    """All that was measured, on what and with which versions, for a JSON file.

    Args:
      measurements: all of them.
      peaks: of the device, by the name of the dtype.
      command: the command line.
      settings: its options, with the defaults that were chosen.
      load_before: see `load`, before anything ran.
    """
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {**machine(), "load_before": load_before},
        "versions": versions(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "settings": settings,
        "peaks": {dtype: found._asdict() for dtype, found in peaks.items()},
        "measurements": [_measurement(m) for m in measurements],
    }


def load() -> float:
    """Processes that ran or waited for a core, the mean of the last minute; 0 if unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def machine() -> dict[str, Any]:
    """The device, the processor and the cores that this process may use."""
    device = jax.local_devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "cpu": _cpu(),
        "cores": peers.cores(),
    }


def versions() -> dict[str, str | None]:
    """Of Python and of the libraries; None of those that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = None
    return found


def _cpu() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())


def _measurement(m: Measurement) -> dict[str, Any]:
    return {
        "model": m.case.name,
        "mode": m.case.mode,
        "size": m.case.size,
        "batch": m.case.batch,
        "dtype": m.case.dtype.name,
        "roofline_seconds": m.bound,
        "contenders": [_contender(m, result) for result in m.results],
        "fastest": {peer: result.form for peer, result in m.fastest().items()},
    }


def _contender(m: Measurement, result: Result) -> dict[str, Any]:
    row: dict[str, Any] = dataclasses.asdict(result)
    costs = row.pop("costs")
    row |= {f"memory_{source}_bytes": n for source, n in costs.pop("memory").items()}
    row |= costs
    if result.seconds:
        value = m.ratio(result)
        row |= {
            "median_seconds": result.median,
            "images_per_second": m.case.batch / result.median,
            "roofline_share": m.bound / result.median,
            "ratio": None if value is None else value._asdict(),
        }
    return row
