"""Tests of `python -m benchmarks.pipeline`: what is measured, never how fast it was."""

import importlib.util
import io
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import pipeline
from resflax.bench import report
from resflax.data.folder import FolderSource

HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None

SMALL = ("--images", "9", "--batch", "4", "--size", "16", "--threads", "2", "--repeats", "3")


@pytest.fixture
def source(tmp_path):
    return pipeline.write_folder(tmp_path, 9)


def crops(source, **settings):
    defaults = {"size": 16, "batch_size": 4, "threads": 2, "passes": 1, "seed": 0}
    return np.stack(list(pipeline.batches(source, **(defaults | settings))))


def test_files_are_as_large_as_photographs():
    files = list(pipeline.jpegs(4))
    assert len(set(files)) == 4
    for data in files:
        assert Image.open(io.BytesIO(data)).size == (500, 375)
        assert 50_000 < len(data) < 100_000
    assert list(pipeline.jpegs(2)) == files[:2]


def test_a_pass_holds_whole_batches_of_crops(source):
    images = crops(source)
    assert images.shape == (2, 4, 16, 16, 3)
    assert images.dtype == np.uint8
    # Of different files, and none of them empty.
    means = images.reshape(8, -1, 3).mean(1)
    assert len(np.unique(means.round(3), axis=0)) == 8
    assert images.reshape(8, -1).std(1).min() > 1


def test_every_pass_has_another_order(tmp_path):
    for i in range(12):
        Image.new("L", (20, 20), i).save(tmp_path / f"{i:02}.png")
    source = FolderSource.of([(path, 0) for path in sorted(tmp_path.iterdir())])
    numbers = crops(source, passes=3)[..., 0, 0, 0].reshape(3, 12)
    np.testing.assert_array_equal(np.sort(numbers), np.tile(np.arange(12), (3, 1)))
    assert len({tuple(row) for row in [np.arange(12), *numbers]}) == 4


def test_crops_depend_on_the_seed_and_not_on_the_threads(source):
    images = crops(source, passes=2)
    np.testing.assert_array_equal(images, crops(source, passes=2, threads=1))
    assert not np.array_equal(images, crops(source, passes=2, seed=1))
    assert not np.array_equal(images[:2], images[2:])


def test_the_command_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "load", lambda: 0.0)
    file = tmp_path / "results" / "pipeline.json"
    assert pipeline.main([*SMALL, "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    (ours,) = written["measurements"]
    assert len(ours["seconds_of_a_pass"]) == 3
    assert written["images_per_pass"] == 8
    rate = 8 / np.median(ours["seconds_of_a_pass"])
    assert ours["images_per_second"] == pytest.approx(rate)
    assert f"{rate:,.0f}" in capsys.readouterr().out
    assert len(written["resident_bytes_by_pass"]) == 11
    assert written["versions"]["pillow"]
    assert written["settings"]["threads"] == 2


@pytest.mark.skipif(not HAS_TENSORFLOW, reason="tensorflow is not installed")
def test_beside_tensorflow(tmp_path, capsys):
    file = tmp_path / "pipeline.json"
    assert pipeline.main([*SMALL, "--peer", "tf.data", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["measurements"]
    assert [row["form"] for row in rows] == ["", "tuned", "2 threads", "2 threads, antialiased"]
    assert all(row["ratio"]["lower"] <= row["ratio"]["median"] for row in rows[1:])
    assert "tf.data tuned" in capsys.readouterr().out


@pytest.mark.skipif(HAS_TENSORFLOW, reason="tensorflow is installed")
def test_a_peer_that_is_not_installed_is_named(capsys):
    with pytest.raises(SystemExit):
        pipeline.main(["--peer", "tf.data"])
    assert 'needs tensorflow, which is not installed: pip install "resflax[tf]"' in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "63"], "--images 63 must be at least 64"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--size", "0"], "--size 0 must be at least 1"),
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--repeats", "2"], "--repeats 2 must be at least 3"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        pipeline.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {message}.\n"
