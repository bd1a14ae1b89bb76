"""What a person sees of a run: a live bar in a terminal, plain lines elsewhere."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, cast

import rich.box
import rich.console
import rich.progress
import rich.table

from resflax.models import Count


class Console:
    """Prints a run's course; silent where `active` is false, as in every process but the first."""

    # Seconds between two lines about the progress where no bar can move.
    PLAIN_INTERVAL = 15.0

    def __init__(self, active: bool = True):
        output = cast(IO[str], _Output())
        self._console = rich.console.Console(file=output, quiet=not active, highlight=False)
        self._bar: rich.progress.Progress | None = None
        self._last_line = time.monotonic()

    def print(self, text: str, style: str | None = None) -> None:
        """A line above the bar."""
        self._console.print(text, style=style, soft_wrap=True, markup=False)

    def network(self, cost: Count) -> None:
        """A table of what each stage costs."""
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("part", "output", "parameters", "MACs"):
            table.add_column(heading, justify="left" if heading == "part" else "right")
        for part, row in stages(cost).items():
            shape = " x ".join(map(str, row.output_shape))
            table.add_row(part, shape, f"{row.params:,}", f"{row.macs:,}")
        table.add_section()
        table.add_row("total", "", f"{cost.params:,}", f"{cost.macs:,}", style="bold")
        self._console.print(table)

    @contextlib.contextmanager
    def bar(self, first_step: int, total_steps: int) -> Iterator[None]:
        """Shows a bar, where there is a terminal; takes it away at the end."""
        if not self._console.is_terminal:
            yield
            return
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("epoch {task.fields[epoch]}"),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[metrics]}"),
            rich.progress.TimeRemainingColumn(compact=True),
            rich.progress.TextColumn("left"),
            console=self._console,
            expand=True,
            transient=True,
        )
        with self._bar:
            self._bar.add_task(
                "train", total=total_steps, completed=first_step, epoch="-", metrics="compiling"
            )
            yield
        self._bar = None

    def progress(self, step: int, total_steps: int, epoch: float, m: Mapping[str, float]) -> None:
        """Moves the bar, or once in a while prints a line.

        Args:
          step: steps done.
          total_steps: steps of the run.
          epoch: epochs done.
          m: 'train/lr'; 'train/loss', where a step had a finite one; from the second step on,
            'train/seconds_per_step' and 'train/images_per_second'.
        """
        if "train/seconds_per_step" not in m or "train/loss" not in m:
            return
        text = f"{m['train/images_per_second']:,.0f} images/s  "
        text += f"loss {m['train/loss']:.4f}  lr {m['train/lr']:.4g}"
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], completed=step, epoch=f"{epoch:.1f}", metrics=text
            )
        elif time.monotonic() - self._last_line > self.PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            left = (total_steps - step) * m["train/seconds_per_step"]
            self.print(f"epoch {epoch:6.2f}  step {step}/{total_steps}  {text}  {left:.0f} s left")


class _Output:
    """sys.stdout; a run goes on where it can be written to no more, as after a closed terminal."""

    @property
    def _file(self) -> Any:
        # A bar puts itself in the place of sys.stdout.
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    def __getattr__(self, name: str) -> Any:
        if name == "rich_proxied_file":  # rich would write there itself
            raise AttributeError(name)
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Writes text, or loses it."""
        return self._try(self._file.write, text)

    def flush(self) -> None:
        """Flushes, or loses what is there."""
        self._try(self._file.flush)

    def _try(self, do: Callable[..., Any], *arguments: str) -> Any:
        try:
            return do(*arguments)
        except OSError:
            # What is in the buffer would fail too, at the latest where the process ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())
            return 0


def stages(cost: Count) -> dict[str, Count]:
    """The parts that have parameters, with the blocks of a stage added up: 'stage3 (4 blocks)'."""
    groups: dict[str, list[Count]] = {}
    for part, row in cost.parts.items():
        if not row.params:
            continue
        groups.setdefault(part.split("_block")[0], []).append(row)

    return {
        f"{name} ({len(rows)} blocks)" if len(rows) > 1 else name: Count(
            sum(row.params for row in rows),
            sum(row.macs for row in rows),
            sum(row.activations for row in rows),
            rows[-1].output_shape,
        )
        for name, rows in groups.items()
    }
