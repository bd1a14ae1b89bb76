import json

import forked
import pytest

import resflax
from resflax.run.console import Console, stages
from resflax.run.curves import read_metrics
from resflax.run.progress import NonFiniteError, Progress
from resflax.run.writers import MetricWriter

METRICS = {"loss": 1.0, "top1": 0.5, "grad_norm": 2.0, "layer_norms": (2.0,), "skipped": 0.0}


def progress(writer=None, every_steps=2, console=None):
    return Progress(
        console or Console(active=False),
        writer,
        lambda step: 0.1 * step,
        total_steps=5,
        steps_per_epoch=2,
        batch_size=8,
        every_steps=every_steps,
    )


def test_stages_add_up_to_the_network():
    cost = resflax.count(resflax.create_model("se_resnet50", 10), (64, 64, 3))
    rows = stages(cost)
    assert list(rows) == [
        "stem",
        "stage2 (3 blocks)",
        "stage3 (4 blocks)",
        "stage4 (6 blocks)",
        "stage5 (3 blocks)",
        "head",
    ]
    assert sum(row.params for row in rows.values()) == cost.params
    assert sum(row.macs for row in rows.values()) == cost.macs
    assert rows["stage5 (3 blocks)"].output_shape == (2, 2, 2048)


def test_without_a_terminal_there_are_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(Console, "PLAIN_INTERVAL", -1.0)
    console = Console()
    with console.bar(0, 5):
        follow = progress(console=console)
        for step in (1, 2, 3):
            follow.steps(step, [METRICS])
        follow.evaluation(3, {"loss": 0.25, "top1": 0.875, "top5": 1.0}, is_best=True)
    lines = capsys.readouterr().out.splitlines()
    # The first step compiles, and says nothing of the speed.
    assert len(lines) == 3
    assert lines[1].startswith("epoch   1.50  step 3/5")
    assert "loss 1.0000  lr 0.2" in lines[1]
    assert lines[2].endswith("eval loss 0.2500  top-1 87.50%  top-5 100.00%  best")
    assert "\x1b" not in "".join(lines)


CLOSED = """
import os, pty, sys
from resflax.run.console import Console
ours, theirs = pty.openpty()
os.dup2(theirs, 1)
os.close(theirs)
sys.stdout = open(1, "w", closefd=False)
console = Console()
console.print("seen")
with console.bar(0, 5):
    os.read(ours, 10_000)
    os.close(ours)
    console.print("lost")
    print("lost too")
print("the run went on", file=sys.stderr)
"""


def test_a_terminal_that_is_closed_does_not_end_the_run():
    result = forked.run("-c", CLOSED)
    assert (result.code, result.errors) == (0, "the run went on\n")


def test_means_over_the_interval_are_written(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        follow = progress(writer)
        for step, loss in enumerate((1.0, 3.0, 5.0, 8.0, 10.0), start=1):
            follow.steps(step, [{**METRICS, "loss": loss}])
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["train/loss"]) for line in lines] == [(2, 2.0), (4, 6.5), (5, 10.0)]
    assert [line["epoch"] for line in lines] == [1.0, 2.0, 2.5]
    assert lines[1]["train/images_per_second"] > 0


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_the_run_with_its_step(name, value):
    with pytest.raises(NonFiniteError, match=r"of step 3 \(epoch 1.50\) is (nan|inf)"):
        progress().steps(3, [{**METRICS, name: value, "skipped": 1.0}])
    with pytest.raises(NonFiniteError, match=r"of step 3 \(epoch 1.50\) is (nan|inf)"):
        progress().steps(5, [METRICS, {**METRICS, name: value, "skipped": 1.0}, METRICS, METRICS])


def test_steps_of_one_call_are_seen_one_by_one(monkeypatch):
    lines = {}
    now = [0.0]
    monkeypatch.setattr("resflax.run.progress.time.monotonic", lambda: now[0])

    class Writer:
        def write(self, step, epoch, means):
            lines[step] = means

    follow = progress(Writer(), every_steps=1)
    losses = [{**METRICS, "loss": float(step)} for step in range(1, 6)]
    for time, first, last in ((10.0, 0, 2), (12.0, 2, 4), (20.0, 4, 5)):
        now[0] = time
        follow.steps(last, losses[first:last])
    assert {step: means["train/loss"] for step, means in lines.items()} == {
        1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0,
    }  # fmt: skip
    assert lines[5]["train/lr"] == pytest.approx(0.4)
    # The first call compiles; so does the first one of another length.
    assert "train/seconds_per_step" not in lines[2]
    assert [lines[step]["train/seconds_per_step"] for step in (3, 4, 5)] == [1.0, 1.0, 1.0]


def test_a_torn_line_is_cut_before_the_next_is_written(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(1, 0.5, {"train/loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "epo')
    with MetricWriter(tmp_path, 1) as writer:
        writer.write(2, 1.0, {"train/loss": 0.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert (tmp_path / "curves.png").stat().st_size > 1000
