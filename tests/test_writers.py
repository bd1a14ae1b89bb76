"""Tests of the files that a run's metrics go to, as they are read back."""

import json
import struct

import pytest
from tensorboardX.proto import event_pb2

from resflax.writers import MetricWriter


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
