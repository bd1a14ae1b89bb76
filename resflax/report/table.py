"""The table of a study: in the terminal, as Markdown, as HTML and as CSV."""

import collections
import csv
import html
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import rich.box
import rich.console
import rich.markup
import rich.table

from resflax.report.runs import Outcome
from resflax.report.study import Group, Statistic, Study
from resflax.report.study import show as text_of

LEGEND = (
    "Mean ± standard deviation over the n finished runs, one for each seed. Error: top-1, of the "
    "test images, after the last step and at each run's best evaluation. MACs: multiply-adds for "
    "one image. Seconds: of a whole run, all its starts."
)

TEST_LEGEND = (
    "Runs that have a test error chose their best by other images, set aside to validate on: their "
    "error is of those."
)

CAPTION = (
    "Accuracy: after the last step. Bars and bands: one standard deviation over seeds, to either "
    "side. Dashed curves: no run of the configuration has finished."
)

# Wider than any table, characters.
_WIDEST = 100_000

# Columns with an error, and which of a group it is.
_ERRORS = {"final error, %": "final_error", "best error, %": "best_error"}
_TEST_ERRORS = {"final test error, %": "test_error", "best test error, %": "best_test_error"}

_STYLE = (
    "body{font:15px/1.4 sans-serif;color:#333;max-width:70em;margin:2em auto}"
    "table{border-collapse:collapse}th,td{padding:.2em .8em;text-align:right}"
    "th{border-bottom:1px solid #333}td.text,th.text{text-align:left}img{max-width:100%}"
)


def headings(study: Study) -> list[str]:
    """Of the columns: what varies, or the network if nothing does, and the numbers."""
    fields = [study.labels[field] for field in study.fields]
    return [*(fields or ["network"]), "n", *_errors(study), "parameters", "MACs", "seconds"]


def rows(study: Study) -> Iterator[list[str]]:
    """The cells of each configuration, as text."""
    for group in study.groups:
        settings = [text_of(group.settings[field]) for field in study.fields]
        size = (
            ["", ""] if group.size is None else [f"{group.size.params:,}", f"{group.size.macs:,}"]
        )
        yield [
            *(settings or [study.common["model.name"]]),
            _count(group),
            *(_spread(getattr(group, name), 2) for name in _errors(study).values()),
            *size,
            _spread(group.seconds, 1),
        ]


def _errors(study: Study) -> dict[str, str]:
    """The columns with errors: of the test images too, where some runs validated on others."""
    tested = any(group.test_error for group in study.groups)
    return _ERRORS | _TEST_ERRORS if tested else _ERRORS


def legend(study: Study) -> str:
    """What the columns are."""
    return LEGEND if _errors(study) is _ERRORS else f"{LEGEND} {TEST_LEGEND}"


def summary(study: Study) -> str:
    """What was found, in one line: 'resnet50 on tfds: 3 runs of 1 configuration, 3 finished'."""
    states = collections.Counter(run.state for run in study.runs)
    counts = (f"{n} {state.value}" for state in Outcome if (n := states[state]))
    runs, configurations = len(study.runs), len(study.groups)
    same = (str(study.common[f]) for f in ("model.name", "data.source") if f in study.common)
    return (
        f"{' on '.join([*same]) or 'several networks'}: "
        f"{runs} run{'s' * (runs != 1)} of {configurations} "
        f"configuration{'s' * (configurations != 1)}, {', '.join(counts)}"
    )


def show(study: Study, console: rich.console.Console) -> None:
    """Prints the table, and cuts nothing off.

    A narrow terminal gets the fields in one column, and cells of several lines; where those do not
    fit either, it breaks the lines itself.
    """
    text = _num_text(study)
    table = _rich(headings(study), rows(study), text)
    widest = console.options.update(width=_WIDEST)
    if console.is_terminal and console.measure(table, options=widest).maximum > console.width:
        heading, *numbers = ", ".join(headings(study)[:text]), *headings(study)[text:]
        cells = ([", ".join(row[:text]), *row[text:]] for row in rows(study))
        table = _rich([heading, *numbers], cells, 1)
    needed = console.measure(table, options=widest)
    width = needed.minimum if console.is_terminal else needed.maximum
    console.width = max(console.width, width)
    console.print(table)


def _rich(
    headings: Sequence[str], rows: Iterable[Sequence[str]], num_text: int
) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(headings):
        justify: Literal["left", "right"] = "left" if place < num_text else "right"
        table.add_column(heading, justify=justify, overflow="fold")
    for cells in rows:
        table.add_row(*(rich.markup.escape(cell) for cell in cells))
    return table


def markdown(study: Study, pictures: Sequence[str] = ()) -> str:
    """A page with the table, what is to be said of single runs, and pictures.

    Args:
      study: of the runs.
      pictures: their addresses, from where the page will be.
    """
    text, names = _num_text(study), headings(study)
    lines = [f"{_escape(summary(study))}.", "", _line(names)]
    lines += [f"|{'---|' * text}{'---:|' * (len(names) - text)}"]
    lines += [_line(cells) for cells in rows(study)]
    lines += ["", legend(study)]
    if study.notes:
        lines += ["", *(f"- `{path}`: {_escape(note)}" for path, note in study.notes)]
    if pictures:
        lines += ["", CAPTION]
    for picture in pictures:
        lines += ["", f"![{_escape(picture.rpartition('/')[2])}](<{picture}>)"]
    return "\n".join(lines) + "\n"


def page(study: Study, pictures: Sequence[str] = ()) -> str:
    """The same as HTML."""
    text, found = _num_text(study), html.escape(summary(study))
    lines = [
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{found}</title>',
        f"<style>{_STYLE}</style>\n<p>{found}.</p>\n<table>",
        _row("th", headings(study), text),
        *(_row("td", cells, text) for cells in rows(study)),
        f"</table>\n<p>{legend(study)}</p>",
    ]
    if study.notes:
        lines.append("<ul>")
        for path, note in study.notes:
            lines.append(f"<li><code>{html.escape(str(path))}</code>: {html.escape(note)}</li>")
        lines.append("</ul>")
    if pictures:
        lines.append(f"<p>{CAPTION}</p>")
    for picture in pictures:
        name = html.escape(picture.rpartition("/")[2])
        lines.append(f'<p><img src="{html.escape(picture)}" alt="{name}"></p>')
    return "\n".join(lines) + "\n</html>\n"


def comma_separated(study: Study) -> str:
    """The numbers with all their digits, and the full names of the fields; nothing is rounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    errors = _errors(study).values()
    spreads = [*(name.replace("_error", "_top1_error_percent") for name in errors), "seconds"]
    names = [f"{name}_{part}" for name in spreads for part in ("mean", "std")]
    writer.writerow([*(study.fields or ["model.name"]), "runs", "n", *names, "params", "macs"])
    for group in study.groups:
        settings = [text_of(group.settings[field]) for field in study.fields]
        numbers: list[float | str | None] = []
        for statistic in (*(getattr(group, name) for name in errors), group.seconds):
            numbers += [None, None] if statistic is None else [statistic.mean, statistic.std]
        size = [None, None] if group.size is None else [group.size.params, group.size.macs]
        writer.writerow(
            [
                *(settings or [study.common["model.name"]]),
                len(group.runs),
                len(group.finished),
                *numbers,
                *size,
            ]
        )
    return text.getvalue()


def _num_text(study: Study) -> int:
    """The number of columns that are not numbers to be compared."""
    return max(1, len(study.fields))


def _count(group: Group) -> str:
    finished, runs = len(group.finished), len(group.runs)
    return str(finished) if finished == runs else f"{finished} of {runs}"


def _spread(statistic: Statistic | None, digits: int) -> str:
    if statistic is None:
        return ""
    mean = f"{statistic.mean:,.{digits}f}"
    return mean if statistic.std is None else f"{mean} ± {statistic.std:,.{digits}f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escape, cells))} |"


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\|*`<>\[\]])", r"\\\1", " ".join(text.split()))


def _row(tag: str, cells: Sequence[str], num_text: int) -> str:
    texts = (f'<{tag} class="text">{html.escape(cell)}</{tag}>' for cell in cells[:num_text])
    numbers = (f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells[num_text:])
    return f"<tr>{''.join(texts)}{''.join(numbers)}</tr>"
