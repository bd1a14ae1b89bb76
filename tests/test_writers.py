"""Tests of the files that a run's metrics go to, as they are read back."""

import contextlib
import json
import resource
import struct
import time

import forked
import plain
import pytest
from tensorboardX.proto import event_pb2

from resflax.run import workdir as workdir_lib
from resflax.run.writers import MetricWriter


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """What TensorBoard's files hold, in the order in which they were begun."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        rest = path.read_bytes()
        while rest:
            (size,) = struct.unpack("<Q", rest[:8])  # then a checksum, the event, and a checksum
            found.append(event_pb2.Event.FromString(rest[12 : 12 + size]))
            rest = rest[16 + size :]
    return found


def scalars(workdir):
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(workdir)
        for value in event.summary.value
    ]


def test_lines_with_all_their_numbers_are_behind_those_of_earlier_starts_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = '{"step": 1, "epoch": 0.5, "train/loss": 1.0}\n'
    path.write_text(before)
    with MetricWriter(tmp_path, 1) as writer:
        assert path.read_text() == before
        writer.write(3, 1 / 3, {"train/loss": 1 / 7, "train/top1": 0.5})
        writer.write(6, 2 / 3, {"eval/loss": 0.25})
        assert path.read_text().startswith(before)
        _, first, second = lines(tmp_path)
    times = first.pop("time"), second.pop("time")
    assert first == {"step": 3, "epoch": 0.3333, "train/loss": 1 / 7, "train/top1": 0.5}
    assert second == {"step": 6, "epoch": 0.6667, "eval/loss": 0.25}
    assert 0 <= times[0] <= times[1] < 60


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "ep')
    with MetricWriter(tmp_path, 0):
        assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("first_step", [0, 7])
def test_tensorboard_forgets_what_is_done_again(tmp_path, first_step):
    with MetricWriter(tmp_path, first_step):
        pass
    starts = [
        event.step
        for event in events(tmp_path)
        if event.session_log.status == event_pb2.SessionLog.START
    ]
    # It drops what it has of this step and of later ones.
    assert starts == [first_step + 1]


def test_the_curves_are_drawn_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    curves = tmp_path / "curves.png"
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(1, 0.5, {"train/loss": 1.0})
        assert not curves.exists()
        monkeypatch.setattr(MetricWriter, "DRAW_INTERVAL", 0.0)
        writer.write(2, 1.0, {"train/loss": 0.5})
        deadline = time.monotonic() + 60
        while not curves.exists():  # it is drawn beside the run
            assert time.monotonic() < deadline
            time.sleep(0.01)
        first = curves.read_bytes()
        monkeypatch.undo()
        writer.write(3, 1.5, {"train/loss": 0.25})
        assert curves.read_bytes() == first
    assert curves.read_bytes() != first


def test_a_run_that_fails_leaves_all_that_it_wrote(tmp_path):
    def run():
        with MetricWriter(tmp_path, 0) as writer:
            writer.write(1, 0.5, {"train/loss": 0.75, "train/lr": 0.125})
            writer.write(2, 1.0, {"eval/top1": 0.5})
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        run()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert scalars(tmp_path) == [
        (1, "train/loss", 0.75),
        (1, "train/lr", 0.125),
        (2, "eval/top1", 0.5),
    ]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_metrics_has_no_curves(tmp_path):
    with MetricWriter(tmp_path, 0):
        pass
    assert not (tmp_path / "curves.png").exists()
    assert lines(tmp_path) == []


def run_of(workdir, steps=3):
    """What is reported where so many lines are written."""
    said = []
    with MetricWriter(workdir, 0, said.append) as writer:
        for step in range(1, steps + 1):
            writer.write(step, step / 2, {"train/loss": 1 / step})
    return said


@contextlib.contextmanager
def full_disk(size=0):
    """As a disk that gets full: no file may have more bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard", "curves.png"])
def test_a_file_that_cannot_be_opened_is_reported_once_and_the_others_are_written(tmp_path, name):
    if name == "tensorboard":
        (tmp_path / name).write_text("mine")
    else:
        (tmp_path / name).mkdir()
    (text,) = run_of(tmp_path)
    assert f"{tmp_path / name}" in text
    assert text.endswith(
        ("Is a directory. The run goes on without it.", "File exists. The run goes on without it.")
    )
    if name != "metrics.jsonl":
        assert len(lines(tmp_path)) == 3
    if name != "tensorboard":
        assert len(scalars(tmp_path)) == 3


def test_a_device_that_is_full_is_reported_once(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (text,) = run_of(tmp_path, steps=2)
    assert text == (
        f"{tmp_path}/metrics.jsonl cannot be written: No space left on device. The run goes on "
        "without it."
    )


def test_when_there_is_room_again_whole_lines_and_events_follow(tmp_path):
    said = []
    with MetricWriter(tmp_path, 0, said.append) as writer:
        writer.write(1, 0.5, {"train/loss": 1.0})
        with full_disk(size=150):  # of a line, a part fits
            for step in (2, 3, 4):
                writer.write(step, 1.0, {"train/loss": 0.5})
        writer.write(5, 2.5, {"train/loss": 0.25})
    assert [line["step"] for line in lines(tmp_path)][-1] == 5
    assert len(lines(tmp_path)) < 5
    assert [step for step, _, _ in scalars(tmp_path)][-1] == 5
    assert len(scalars(tmp_path)) < 5
    assert sorted(text.partition(" cannot")[0].rpartition("/")[2][:6] for text in said) == [
        "events",
        "metric",
    ]


@pytest.mark.parametrize("jump", [1e9, -1e9, 1e12])
def test_a_clock_that_jumps_holds_nobody(tmp_path, monkeypatch, jump):
    with MetricWriter(tmp_path, 0) as writer:
        for step in range(1, 40):
            writer.write(step, step / 2, {"train/loss": 1 / step})
            now = time.time() + jump * (step % 2)
            monkeypatch.setattr(time, "time", lambda now=now: now)
    assert len(scalars(tmp_path)) == 39


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "garbage",
    [
        b"{\n",
        b"\xff\x00\n",
        b"[]\n",
        b'{"step": NaN, "epoch": 1}\n',
        b"[" * 9999 + b"\n",
        b"\0" * 99,
    ],
)
def test_a_line_that_is_none_is_left_out_of_the_curves_and_reported_once(
    tmp_path, monkeypatch, garbage
):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "epoch": 0.5}\n' + garbage)
    monkeypatch.setattr(MetricWriter, "DRAW_INTERVAL", -1.0)
    said = run_of(tmp_path, steps=1)  # drawn twice
    if garbage.endswith(b"\n"):
        (text,) = said
        assert text.startswith(f"{path}, line 2, is left out: ")
    else:
        assert not said
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_that_cannot_be_drawn_end_no_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"step": {10**30}, "epoch": 1}}\n{{"step": 1, "epoch": 1e308, "train/loss": {10**30}}}\n'
    )
    said = run_of(tmp_path)
    assert all("\n" not in text for text in said)


@pytest.mark.long
def test_a_run_with_a_full_disk_at_every_writer_ends_well(tmp_path):
    """Its metrics, events, picture and log go where there is no room."""
    workdir = tmp_path / "run"
    workdir_lib.open_run(workdir, plain.get_config())
    (workdir / "metrics.jsonl").symlink_to("/dev/full")
    (workdir / "tensorboard").write_text("")
    (workdir / "curves.png").mkdir()
    arguments = ("--config", "tests/plain.py", "--workdir", workdir)
    result = forked.run("resflax.main", *arguments)
    assert result.code == 0, result.errors
    assert json.loads((workdir / "result.json").read_text())["eval/top1"] >= 0
    assert result.output.count("metrics.jsonl cannot be written: No space left on device.") == 1
    assert result.output.count("tfevents") == 1


LOG_TO_FULL_DISK = """
import os, runpy, sys
del sys.argv[1]
for number in (1, 2):
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)
runpy.run_module("resflax.main", run_name="__main__", alter_sys=True)
"""


@pytest.mark.long
def test_a_run_whose_log_has_no_room_ends_well(tmp_path):
    arguments = ("--config", "tests/plain.py", "--workdir", tmp_path / "run")
    result = forked.run("-c", LOG_TO_FULL_DISK, *arguments)
    assert result.code == 0, result
    assert (tmp_path / "run/result.json").exists()
