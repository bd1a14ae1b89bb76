import io
import pathlib

import rich.console

from launch import table
from launch.runs import Run
from launch.status import State, Status

STATUSES = {
    "depth=8": Status(State.DONE, 2.0, 2.0, 0.975),
    "depth=14": Status(State.RUNNING, 0.5, 2.0, 0.5),
    "depth=20": Status(State.FAILED, 1.0, 2.0, 0.1, "the loss of step 3 [epoch 1] is nan"),
    "depth=26": Status(State.QUEUED, 0.0, 2.0),
    "depth=32": Status(State.QUEUED, 0.0, 2.0),
}


def draw(renderable, width=100):
    console = rich.console.Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()


def rows_of(text):
    return [row.strip() for row in text.splitlines() if row.startswith(" depth=")]


def test_each_run_has_a_row():
    text = draw(table.table(STATUSES, 100.0))
    rows = {row.split()[0]: row for row in rows_of(text)}
    assert list(rows) == list(STATUSES)
    assert rows["depth=8"].split()[1:3] + rows["depth=8"].split()[-1:] == [
        "done",
        "2.0/2",
        "97.50%",
    ]
    assert rows["depth=14"].split()[1:3] == ["running", "0.5/2"]
    assert "the loss of step 3 [epoch 1] is nan" in rows["depth=20"]
    assert rows["depth=26"].split()[1:] == ["queued", "0.0/2"]
    assert "1 of 5 done, 2 queued, 1 running, 1 failed; 0:01:40" in text


def test_a_low_terminal_shows_what_matters():
    text = draw(table.table(STATUSES, 0.0, height=3))
    shown = [row.split()[0] for row in rows_of(text)]
    assert shown == ["depth=14", "depth=20", "depth=26"]
    assert "2 not shown" in text


def test_a_narrow_terminal_has_one_line_a_run():
    text = draw(table.table(STATUSES, 0.0, height=5), width=60)
    assert len(rows_of(text)) == text.count("depth=") == len(STATUSES)
    assert "failed" in text
    assert "…" in text
    assert "97.50%" in text


def test_the_last_table_has_errors_in_full():
    long = "a loss that is not finite, " * 8 + "the end."
    text = draw(table.table({"depth=8": Status(State.FAILED, error=long)}, 0.0), width=60)
    assert "".join(long.split()) in "".join(text.split())


def test_a_file_gets_a_line_for_every_change(capsys):
    runs = [Run(name, "config.py", {}, pathlib.Path(name)) for name in STATUSES]
    queued = {name: Status(State.QUEUED, epochs=2.0) for name in STATUSES}
    with table.display(runs) as show:
        show(queued | {"depth=8": STATUSES["depth=8"]})
        show(queued | {"depth=8": STATUSES["depth=8"], "depth=14": STATUSES["depth=14"]})
        show(STATUSES)
        show(STATUSES)
    assert capsys.readouterr().out.splitlines() == [
        "[1/5] depth=8: done, top-1 97.50%",
        "[2/5] depth=14: running, top-1 50.00%",
        "[3/5] depth=20: failed: the loss of step 3 [epoch 1] is nan",
        "1 of 5 done, 2 queued, 1 running, 1 failed; 0:00:00",
    ]
