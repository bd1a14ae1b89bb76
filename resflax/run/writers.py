"""Where a run's metrics go: metrics.jsonl, TensorBoard's event files, and curves.png.

A run does not need them: a file that cannot be written is reported once, and the run goes on.
"""

import concurrent.futures
import contextlib
import functools
import io
import json
import os
import pathlib
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Self

from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from resflax.run import curves
from resflax.run import workdir as workdir_lib


class Attempts:
    """Writes that a run can do without."""

    def __init__(self, report: Callable[[str], None]):
        """Nothing has failed so far.

        Args:
          report: called once for each file that cannot be written, with a line about it.
        """
        self._report = report
        self._reported: set[str] = set()

    def __call__(self, path: pathlib.Path, write: Callable[[], None]) -> None:
        """Writes to a file, and reports it if the file system refuses."""
        try:
            write()
        except OSError as error:
            self.failed(path, error.strerror or str(error))

    def failed(self, path: pathlib.Path, why: str) -> None:
        """Reports a file that cannot be written."""
        self.once(str(path), f"{path} cannot be written: {why}. The run goes on without it.")

    def once(self, key: str, text: str) -> None:
        """Reports the first of the texts with a key."""
        if key not in self._reported:
            self._reported.add(key)
            self._report(text)


class MetricWriter:
    """Appends metrics to the run's files, and draws them; one process of a run has one."""

    # Seconds between two drawings of the curves while the run goes on.
    DRAW_INTERVAL = 60.0

    def __init__(
        self,
        workdir: pathlib.Path,
        first_step: int,
        report: Callable[[str], None] = lambda text: None,
    ):
        """Opens the files.

        Args:
          workdir: of the run.
          first_step: what an interrupted run wrote after this step is done again; TensorBoard
            forgets it, and readers of metrics.jsonl see it in the order of the lines.
          report: called once for each file that cannot be written, with a line about it.
        """
        self._workdir = workdir
        self._attempt = Attempts(report)
        metrics = workdir / workdir_lib.METRICS
        self._attempt(metrics, functools.partial(_cut_torn_line, metrics))
        events = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._lines = _Records(metrics)
        self._events = _Records(workdir / workdir_lib.EVENTS / events, _beginning(first_step))
        for file in (self._lines, self._events):
            self._attempt(file.path, functools.partial(file.append, b""))
        self._history: list[dict[str, float]] = []
        if metrics.is_file():
            left_out = functools.partial(self._attempt.once, "left out")
            self._attempt(
                metrics, lambda: self._history.extend(curves.read_metrics(metrics, left_out))
            )
        self._drawer = concurrent.futures.ThreadPoolExecutor(1, "curves")
        self._drawing: concurrent.futures.Future[None] | None = None
        self._start = self._drawn = time.monotonic()

    def _read(self) -> None:
        """Reads what earlier starts of the run wrote."""
        metrics = self._workdir / workdir_lib.METRICS
        if metrics.is_file():
            left_out = functools.partial(self._attempt.once, "left out")
            self._history = curves.read_metrics(metrics, left_out)

    def write(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Writes one line, with the seconds since this start of the run as 'time'."""
        seconds = time.monotonic() - self._start
        line = {"step": step, "epoch": round(epoch, 4), "time": round(seconds, 3), **metrics}
        curves.add(line, self._history)
        texts = {self._lines: json.dumps(line).encode() + b"\n"}
        texts[self._events] = b"".join(
            _record(event_pb2.Event(step=step, summary=summary.scalar(name, value)))
            for name, value in metrics.items()
        )
        for file, text in texts.items():
            self._attempt(file.path, functools.partial(file.append, text))
        if time.monotonic() - self._drawn > self.DRAW_INTERVAL:
            self._drawn = time.monotonic()
            if self._drawing is None or self._drawing.done():
                self._drawing = self._drawer.submit(self._draw, list(self._history))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Draws what is not yet drawn, also when the run fails."""
        for file in (self._lines, self._events):
            self._attempt(file.path, file.close)
        self._drawer.shutdown()
        self._draw(self._history)

    def _draw(self, lines: curves.Metrics) -> None:
        picture = self._workdir / workdir_lib.CURVES
        try:
            if lines:
                title = f"{self._workdir.parent.name}/{self._workdir.name}"
                curves.plot_curves(lines, picture, title=title)
        # Matplotlib may raise anything for unusual numbers, and a picture must not end a run.
        except Exception as error:
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self._attempt.failed(picture, why)


class _Records:
    """A file that grows by whole records: a record that cannot be written leaves nothing."""

    def __init__(self, path: pathlib.Path, beginning: bytes = b""):
        """Opens nothing.

        Args:
          path: of the file; what it holds stays.
          beginning: written in front of the first record.
        """
        self.path = path
        self._beginning = beginning
        self._file: io.FileIO | None = None

    def append(self, record: bytes) -> None:
        """Writes a record behind the others; raises OSError if it cannot be written."""
        if self._file is None:
            self.path.parent.mkdir(exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        end = self._file.seek(0, os.SEEK_END)
        rest = self._beginning + record
        try:
            while rest:
                rest = rest[os.write(self._file.fileno(), rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise
        self._beginning = b""

    def close(self) -> None:
        """Closes the file; raises OSError if the file system reports a failed write only now."""
        if self._file is not None:
            self._file.close()


def _beginning(first_step: int) -> bytes:
    """The first two events of a file: its version, and the step from which older events go."""
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    return _record(event_pb2.Event(file_version="brain.Event:2")) + _record(
        event_pb2.Event(step=first_step + 1, session_log=start)
    )


def _record(event: event_pb2.Event) -> bytes:
    """An event as a TFRecord.

    TensorBoardX's own writer has a thread, which a full disk or a clock that jumps ends, and a
    queue, in which the run then waits for ever.
    """
    event.wall_time = time.time()
    data = event.SerializeToString()
    size = struct.pack("<Q", len(data))
    checks = [struct.pack("<I", masked_crc32c(part)) for part in (size, data)]
    return size + checks[0] + data + checks[1]


def _cut_torn_line(path: pathlib.Path) -> None:
    """Removes what a killed process had begun to write, so that the file stays readable."""
    if path.is_file():
        text = path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            with path.open("r+b") as file:
                file.truncate(whole)
