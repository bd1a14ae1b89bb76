"""Tests of the learning curves: what is read from a metrics file and that every run draws."""

import json
import math
import resource

import matplotlib.image
import numpy as np
import pytest

from resflax.run import curves


def _train(step, loss=0.5, rate=0.1, **extra):
    numbers = {"train/loss": loss, "train/top1": 0.8, "train/lr": rate}
    return {"step": step, "epoch": step / 10, "time": 1.0 * step, **numbers, **extra}


def _eval(step, top1=0.9):
    numbers = {"eval/loss": 0.4, "eval/top1": top1, "eval/top5": 0.99}
    return {"step": step, "epoch": step / 10, "time": 1.0 * step, **numbers}


def _run(points=40, rate=0.1):
    lines = []
    for step in range(1, points + 1):
        lines.append(_train(step, loss=2.0 / step, rate=rate))
        if step % 10 == 0:
            lines.append(_eval(step, top1=1.0 - 1.0 / step))
    return lines


def _write(folder, lines, tail=""):
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail, encoding="utf-8")
    return path


def _steps(metrics):
    return [(line["step"], "eval" if "eval/loss" in line else "train") for line in metrics]


def test_read_keeps_every_line_of_a_plain_run(tmp_path):
    lines = _run()
    assert curves.read_metrics(_write(tmp_path, lines)) == lines


def test_read_ignores_a_torn_last_line(tmp_path):
    path = _write(tmp_path, [_train(1), _train(2)], tail='{"step": 3, "epoch": 0.3, "tra')
    assert _steps(curves.read_metrics(path)) == [(1, "train"), (2, "train")]


def test_read_rejects_a_broken_line_inside_the_file(tmp_path):
    path = _write(tmp_path, [_train(1)], tail='{"step": 2, "ep\n' + json.dumps(_train(3)) + "\n")
    with pytest.raises(ValueError, match="line 2"):
        curves.read_metrics(path)


def test_read_rejects_a_line_without_a_step(tmp_path):
    with pytest.raises(ValueError, match="line 1: not a JSON object with a step"):
        curves.read_metrics(_write(tmp_path, [{"epoch": 1.0}, _train(1)]))


def test_read_drops_entries_that_are_not_numbers(tmp_path):
    path = _write(tmp_path, [_train(1, host="a", note=None)])
    assert curves.read_metrics(path) == [_train(1)]


def test_read_drops_superseded_steps(tmp_path):
    before = [_train(1), _train(2), _eval(2), _train(3, loss=9.0), _train(4, loss=9.0), _eval(4)]
    after = [_train(3, loss=0.3), _train(4, loss=0.2), _eval(4, top1=0.95), _train(5)]
    metrics = curves.read_metrics(_write(tmp_path, before + after))
    assert metrics == before[:3] + after


@pytest.mark.parametrize("last", [[_train(2)], [_train(2), _eval(2)]])
def test_read_drops_a_repeated_step(tmp_path, last):
    again = [_train(2, loss=0.1), _eval(2, top1=0.5)]
    metrics = curves.read_metrics(_write(tmp_path, [_train(1), *last, *again]))
    assert metrics == [_train(1), *again]


def test_read_drops_later_steps_of_the_other_kind(tmp_path):
    path = _write(tmp_path, [_train(1), _train(3), _eval(2)])
    assert curves.read_metrics(path) == [_train(1), _eval(2)]


RUNS = {
    "full": _run(),
    "long": _run(points=5000),
    "no evaluation": [line for line in _run() if "train/loss" in line],
    "evaluation only": [_eval(10)],
    "single point": [_train(1)],
    "step zero": [_train(0)],
    "last loss NaN": [*_run(), _train(41, loss=math.nan)],
    "every loss NaN": [_train(1, loss=math.nan), _train(2, loss=math.inf)],
    "loss reaches zero": [*_run(), _train(41, loss=0.0)],
    "rate zero": _run(rate=0.0),
}


@pytest.mark.first(1)
@pytest.mark.parametrize("name", RUNS)
def test_plot_writes_a_picture_and_nothing_else(tmp_path, name):
    metrics = curves.read_metrics(_write(tmp_path, RUNS[name]))
    path = tmp_path / "curves.png"
    curves.plot_curves(metrics, path, title=rf"A $\run$: {name}")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 1000
    assert 0.01 < np.mean(pixels[..., :3].min(axis=-1) < 0.95) < 0.5  # ink on white paper
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_plot_replaces_an_older_picture(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    curves.plot_curves(_run(), path)
    assert path.stat().st_size > 20_000


def test_plot_leaves_the_old_picture_when_writing_fails(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # as a disk that gets full
    try:
        with pytest.raises(OSError, match="File too large"):
            curves.plot_curves(_run(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [
        ("curves.png", b"old")
    ]


def test_plot_rejects_empty_metrics(tmp_path):
    with pytest.raises(ValueError, match="no metrics"):
        curves.plot_curves([], tmp_path / "curves.png")


# A PNG file cannot be asked for its labels and marks: the figure is, before it is written.
def test_figure_scales_and_marks_what_it_shows():
    losses, accuracies, rates = curves._draw(_run(), "").axes
    assert losses.get_yscale() == "log"
    assert accuracies.get_yscale() == "linear"
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["train", "evaluation"]
    (best,) = accuracies.get_legend().get_texts()
    assert best.get_text() == "best 97.50% at epoch 4"
    assert accuracies.lines[-1].get_xydata().tolist() == [[4.0, 97.5]]
    assert rates.lines[0].get_ydata().tolist() == [0.1] * 40


def test_of_equal_accuracies_the_latest_is_marked():
    # As the checkpoint that is kept as the best.
    accuracies = curves._draw([_eval(10, 0.8), _eval(20, 0.9), _eval(30, 0.9)], "").axes[1]
    assert accuracies.lines[-1].get_xydata().tolist() == [[3.0, 90.0]]


def test_legend_names_only_what_is_drawn():
    losses, accuracies, _ = curves._draw(RUNS["no evaluation"], "").axes
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["train"]
    assert accuracies.get_legend() is None


def test_narrow_losses_stay_linear():
    metrics = [_train(1, loss=3.0), _train(2, loss=0.1)]
    assert curves._draw(metrics, "").axes[0].get_yscale() == "linear"


# What is drawn of many numbers is not to be seen in one figure's pixels.
def test_smooth_keeps_a_slope_and_damps_noise():
    slope = np.linspace(1.0, 0.0, 2000)
    smooth = curves._smooth(slope)
    assert np.allclose(smooth[100:-100], slope[100:-100])
    assert np.abs(smooth - slope).max() < 0.005
    noise = np.random.default_rng(0).normal(size=2000)
    assert curves._smooth(noise).std() < 0.2 * noise.std()
