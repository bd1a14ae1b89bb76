"""Where a run's metrics go: metrics.jsonl, TensorBoard's event files, and curves.png."""

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Self

import tensorboardX

from resflax import curves
from resflax import workdir as workdir_lib


class MetricWriter:
    """Appends metrics to the run's files, and draws them; one process of a run has one."""

    # Seconds between two drawings of the curves while the run goes on.
    DRAW_INTERVAL = 60.0

    def __init__(self, workdir: pathlib.Path, first_step: int):
        """Opens the files.

        Args:
          workdir: of the run.
          first_step: what an interrupted run wrote after this step is done again; TensorBoard
            forgets it, and readers of metrics.jsonl see it in the order of the lines.
        """
        self._workdir = workdir
        path = workdir / workdir_lib.METRICS
        _cut_torn_line(path)
        self._lines = path.open("a")
        self._events = tensorboardX.SummaryWriter(
            str(workdir / workdir_lib.EVENTS), purge_step=first_step + 1
        )
        self._start = self._drawn = time.monotonic()

    def write(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Writes one line, with the seconds since this start of the run as 'time'."""
        seconds = time.monotonic() - self._start
        line = {"step": step, "epoch": round(epoch, 4), "time": round(seconds, 3), **metrics}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
        if time.monotonic() - self._drawn > self.DRAW_INTERVAL:
            self._draw()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Writes what is not yet on disk, also when the run fails."""
        self._lines.close()
        self._events.close()
        self._draw()

    def _draw(self) -> None:
        lines = curves.read_metrics(self._workdir / workdir_lib.METRICS)
        if lines:
            curves.plot_curves(
                lines,
                self._workdir / workdir_lib.CURVES,
                title=f"{self._workdir.parent.name}/{self._workdir.name}",
            )
        self._drawn = time.monotonic()


def _cut_torn_line(path: pathlib.Path) -> None:
    """Removes what a killed process had begun to write, so that the file stays readable."""
    if path.exists():
        text = path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            with path.open("r+b") as file:
                file.truncate(whole)
