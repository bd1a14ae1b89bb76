"""Tests of the look that all figures share, and of the file that a figure becomes."""

import os
import stat

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from resflax import figures


def panel(values=(1.0, 2.0, 4.0)):
    """A figure, and its one panel with a line in it."""
    figure = Figure(figsize=(2.0, 1.5))
    axes = figure.subplots()
    axes.plot(range(len(values)), values)
    return figure, axes


def labels(figure, axes):
    """The labels of the ordinate that are drawn, from below."""
    FigureCanvasAgg(figure).draw()
    low, high = axes.get_ylim()
    ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
    shown = {t.get_loc(): t.label1.get_text() for t in ticks if low <= t.get_loc() <= high}
    return [shown[place] for place in sorted(shown) if shown[place]]


def test_lines_have_colours_of_their_own():
    assert len(set(figures.COLOURS)) == 7
    assert all(to_hex(colour).upper() == colour for colour in figures.COLOURS)


def test_a_panel_has_the_look_of_them_all():
    figure, axes = panel()
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    figures.style(axes)
    shown = {side for side, spine in axes.spines.items() if spine.get_visible()}
    assert shown == {"left", "bottom"}
    FigureCanvasAgg(figure).draw()
    for axis in (axes.xaxis, axes.yaxis):
        assert axis.label.get_fontsize() == figures.FONT
        assert axis.label.get_color() == figures.INK
        tick = axis.get_major_ticks()[0]
        assert tick.label1.get_fontsize() == figures.FONT - 1
        assert tick.label1.get_color() == figures.INK
        assert tick.gridline.get_visible()


def test_a_few_decades_are_labelled_as_plain_numbers():
    figure, axes = panel((0.2, 20.0))
    figures.logarithmic(axes)
    assert labels(figure, axes) == ["0.3", "1", "3", "10"]


def test_many_decades_are_labelled_as_powers_and_not_every_one():
    figure, axes = panel((1e-14, 1e6))
    figures.logarithmic(axes)
    found = labels(figure, axes)
    assert 3 <= len(found) <= 8
    assert all("10^{" in label for label in found)


def test_values_that_have_no_logarithm_are_left_out():
    figure, axes = panel((0.0, 0.5, 5.0, -1.0))
    figures.logarithmic(axes)
    low, high = axes.get_ylim()
    assert 0.1 < low < 0.5
    assert 5.0 < high < 10.0
    assert labels(figure, axes) == ["1", "3"]
    # They are gaps of the line, which else would fall to the bottom of the panel.
    places = [axes.transData.transform((0.0, value))[1] for value in (-1.0, 0.0, 0.5)]
    assert np.isfinite(places).tolist() == [False, False, True]


def test_a_figure_is_a_white_png_of_300_dots_an_inch(tmp_path):
    figure, _ = panel()
    figure.set_facecolor("red")
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")
    figures.save(figure, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (600, 450)
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
        assert np.asarray(image.convert("RGB"))[0, 0].tolist() == [255, 255, 255]
    assert [entry.name for entry in tmp_path.iterdir()] == ["figure.png"]


def test_a_figure_has_the_permissions_that_the_user_s_files_have(tmp_path):
    before = os.umask(0o027)
    try:
        figures.save(panel()[0], tmp_path / "figure.png")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "figure.png").stat().st_mode) == 0o640


def test_a_figure_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "figure.png").mkdir()
    with pytest.raises(IsADirectoryError):
        figures.save(panel()[0], tmp_path / "figure.png")
    with pytest.raises(FileNotFoundError):
        figures.save(panel()[0], tmp_path / "gone" / "figure.png")
    assert [entry.name for entry in tmp_path.iterdir()] == ["figure.png"]
