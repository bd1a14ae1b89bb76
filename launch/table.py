"""What a person sees of a sweep: a live table in a terminal, a line for every change elsewhere."""

import collections
import contextlib
import datetime
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import rich.box
import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text

from launch.runs import Run
from launch.status import State, Status

Show = Callable[[Mapping[str, Status]], None]

_STYLES = {
    State.QUEUED: "dim",
    State.RUNNING: "cyan",
    State.INTERRUPTED: "yellow",
    State.DONE: "green",
    State.FAILED: "red",
}

# Which rows a low terminal keeps, first to last.
_RANKS = (State.RUNNING, State.FAILED, State.INTERRUPTED, State.QUEUED, State.DONE)

# Characters of a bar.
_BAR = 16

# Lines of the terminal that are not rows: headings, rules, the summary, the prompt.
_FRAME = 6


@contextlib.contextmanager
def display(runs: Sequence[Run]) -> Iterator[Show]:
    """Shows the runs until it ends, and then once more, in full.

    Yields:
      What is called with the statuses, by the runs' names, as often as one likes.
    """
    console = rich.console.Console(highlight=False)
    start = time.monotonic()
    latest: dict[str, Status] = {}
    if not console.is_terminal:
        yield lambda statuses: _lines(console, runs, latest, statuses)
        if latest:
            console.print(summary(latest, time.monotonic() - start), soft_wrap=True)
        return
    with rich.live.Live(console=console, transient=True, auto_refresh=False) as live:

        def show(statuses: Mapping[str, Status]) -> None:
            latest.update(statuses)
            seconds = time.monotonic() - start
            live.update(table(latest, seconds, console.height - _FRAME), refresh=True)

        yield show
    if latest:
        console.print(table(latest, time.monotonic() - start))


def table(
    statuses: Mapping[str, Status], seconds: float, height: int | None = None
) -> rich.console.Group:
    """A row for each run, and the summary.

    Args:
      statuses: by the runs' names.
      seconds: since the sweep was started.
      height: rows there is room for, of one line each; None: all rows, errors in full.
    """
    shown = _chosen(statuses, height)
    hidden = len(statuses) - len(shown)
    result = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    # Of a narrow terminal, names and errors take what the other columns leave.
    one_line = height is not None
    fit = functools.partial(
        rich.text.Text, no_wrap=one_line, overflow="ellipsis" if one_line else "fold"
    )
    for heading in ("run", "state", "epochs", "", "top-1"):
        right = heading in ("epochs", "top-1")
        result.add_column(
            heading,
            justify="right" if right else "left",
            no_wrap=heading not in ("run", ""),
            min_width=_BAR if heading == "" else None,
        )
    for name in shown:
        status = statuses[name]
        course: rich.console.RenderableType = ""
        if status.error:
            course = fit(status.error, style="red")
        elif status.epoch:
            course = rich.progress_bar.ProgressBar(status.epochs, status.epoch, width=_BAR)
        result.add_row(
            fit(name),
            rich.text.Text(status.state, style=_STYLES[status.state]),
            f"{status.epoch:.1f}/{status.epochs:g}" if status.epochs else "",
            course,
            "" if status.top1 is None else f"{status.top1:.2%}",
        )
    last = summary(statuses, seconds) + (f"; {hidden} not shown" if hidden else "")
    return rich.console.Group(result, rich.text.Text(last))


def summary(statuses: Mapping[str, Status], seconds: float) -> str:
    """How many runs are in which state, such as '3 of 12 done, 1 running, 8 queued; 0:01:40'."""
    count = collections.Counter(status.state for status in statuses.values())
    others = [state for state in State if state is not State.DONE and count[state]]
    parts = [f"{count[State.DONE]} of {len(statuses)} done"]
    parts += [f"{count[state]} {state}" for state in others]
    return f"{', '.join(parts)}; {datetime.timedelta(seconds=int(seconds))}"


def _chosen(statuses: Mapping[str, Status], height: int | None) -> list[str]:
    """The runs to be shown, in the sweep's order."""
    names = list(statuses)
    if height is None or len(names) <= height:
        return names
    ranked = sorted(names, key=lambda name: _RANKS.index(statuses[name].state))
    kept = set(ranked[: max(1, height)])
    return [name for name in names if name in kept]


def _lines(
    console: rich.console.Console,
    runs: Sequence[Run],
    before: dict[str, Status],
    statuses: Mapping[str, Status],
) -> None:
    """A line for each run whose state is another than before."""
    for number, run in enumerate(runs, 1):
        status = statuses[run.name]
        first = run.name not in before
        changed = first or before[run.name].state is not status.state
        before[run.name] = status
        if not changed or (status.state is State.QUEUED and first):
            continue
        top1 = "" if status.top1 is None else f", top-1 {status.top1:.2%}"
        detail = f": {status.error}" if status.error else top1
        # Without markup: a name or an error may have brackets.
        text = f"[{number}/{len(runs)}] {run.name}: {status.state}{detail}"
        console.print(text, soft_wrap=True, markup=False)
