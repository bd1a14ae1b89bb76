"""Tests of the report: real small runs, and directories as runs that were stopped leave them."""

import csv
import io
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import matplotlib.image
import pytest
import rich.console
from matplotlib.backends.backend_agg import FigureCanvasAgg
from plain import config as plain_config

from resflax import config as config_lib
from resflax.models import count
from resflax.report import plots, study, table
from resflax.report import runs as runs_lib
from resflax.report.__main__ import main
from resflax.report.runs import Outcome
from resflax.run import workdir as workdir_lib
from resflax.train import train_and_evaluate

SHAPE = (16, 16, 3)


def network(**overrides):
    return plain_config(**overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run as training leaves it: one epoch of a network that compiles in seconds."""
    path = tmp_path_factory.mktemp("trained") / "run"
    result = train_and_evaluate(network(**{"train.epochs": 1.0}), path)
    return path, result


@pytest.fixture
def make(trained, tmp_path):
    """Makes directories of runs from the files of the trained one, with other configs and results.

    A run that has been trained for each would take the suite's whole time.
    """

    def make(name, top1=None, *, epochs=1.0, **overrides):
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        shutil.copy(trained[0] / workdir_lib.DATASET, path)
        shutil.copy(trained[0] / workdir_lib.METRICS, path)
        overrides = {"train.epochs": epochs} | {
            k.replace("__", "."): v for k, v in overrides.items()
        }
        config = network(**overrides)
        (path / workdir_lib.CONFIG).write_text(config_lib.to_json(config))
        if top1 is not None:
            result = trained[1] | {"eval/top1": top1, "best/top1": top1 + 0.1, "seconds": 60.0}
            workdir_lib.write_result(path, result)
            evaluate(path, top1)
        return path

    return make


def evaluate(path, top1):
    """Gives a run's metrics the evaluations that its result has: the best one, and the last."""
    *lines, last = map(json.loads, (path / workdir_lib.METRICS).read_text().splitlines())
    at = 1 + max(i for i, line in enumerate(lines) if line["step"] == 1)
    time = lines[at - 1]["time"]  # that runs back would be another start's
    best = last | {"step": 1, "epoch": 0.5, "eval/top1": top1 + 0.1, "time": time}
    lines = [*lines[:at], best, *lines[at:], last | {"eval/top1": top1}]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (path / workdir_lib.METRICS).write_text(text)


def compare(path):
    return study.compare(runs_lib.find([path]))


def notes(path):
    return {directory.name: note for directory, note in compare(path).notes}


@pytest.mark.long
def test_a_trained_run_is_read_as_it_was(trained):
    path, result = trained
    run = runs_lib.read(path)
    assert (run.state, run.note) == (Outcome.FINISHED, "")
    assert run.result == result
    assert run.seconds == pytest.approx(result["seconds"])
    assert run.metrics[-1]["eval/top1"] == result["eval/top1"]
    assert runs_lib.size(run) == count(config_lib.build_model(run.config, 10), SHAPE)


def test_runs_are_found_at_any_depth_and_once(make, tmp_path):
    path = make("sweep/a", 0.5)
    make("b", 0.5, seed=1)
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / workdir_lib.CONFIG).write_text("{}")  # of the run, and no run
    os.symlink(tmp_path / "runs", path.parent / "loop")
    found = runs_lib.find([tmp_path / "runs", tmp_path / "runs/sweep", path])
    assert [run.path.name for run in found] == ["b", "a"]


def test_groups_are_what_varies_except_the_seed(make, tmp_path):
    for seed, top1 in enumerate((0.5, 0.6, 0.7)):
        make(f"a{seed}", top1, seed=seed, model__shortcut="A", model__depth=20)
        make(f"b{seed}", 0.9, seed=seed, model__shortcut="B", model__depth=20)
    compared = compare(tmp_path)
    assert compared.fields == ["model.shortcut"]
    assert [group.settings for group in compared.groups] == [
        {"model.shortcut": "A"},
        {"model.shortcut": "B"},
    ]
    final, best = compared.groups[0].final_error, compared.groups[0].best_error
    assert (final.mean, final.std, final.n) == pytest.approx((40.0, 10.0, 3))
    assert best.mean == pytest.approx(30.0)
    assert compared.groups[0].size.params < compared.groups[1].size.params
    assert not compared.notes


@pytest.mark.long
def test_fields_that_determine_each_other_are_one_axis(make, tmp_path):
    for cardinality, width in ((1, 64), (4, 32)):
        for depth in (11, 20):
            make(
                f"{cardinality},{depth}",
                0.5,
                model__name="cifar_resnext29_8x64d",
                model__cardinality=cardinality,
                model__base_width=width,
                model__depth=depth,
            )
    compared = compare(tmp_path)
    assert not compared.notes
    assert [axis.labels for axis in compared.axes] == [("depth",), ("cardinality", "base_width")]
    assert compared.axes[1].values == ((1, 64), (4, 32))
    assert table.headings(compared)[:3] == ["depth", "cardinality", "base_width"]


def test_a_field_is_named_in_full_where_its_last_part_is_not_enough(make, tmp_path):
    make("a", 0.5, train__batch_size=16)
    make("b", 0.5)
    assert table.headings(compare(tmp_path))[0] == "train.batch_size"


def test_numbers_are_in_order_and_a_default_is_called_so(make, tmp_path):
    for drop in (0.1, None, 0.02):
        make(f"{drop}", 0.5, model__drop_path=drop)
    assert [row[0] for row in table.rows(compare(tmp_path))] == ["default", "0.02", "0.1"]


def test_a_repetition_of_a_seed_is_not_counted(make, tmp_path):
    make("first")
    make("second", 0.5)
    make("third", 0.6)
    compared = compare(tmp_path)
    assert compared.groups[0].final_error == study.Statistic(50.0, None, 1)
    said = notes(tmp_path)
    assert set(said) == {"first", "third"}
    assert all("same config and seed as" in note and "second" in note for note in said.values())


def test_what_is_not_finished_is_named_and_not_counted(make, tmp_path):
    make("finished", 0.5)
    unfinished = make("unfinished", epochs=2.0, seed=1)
    make("queued", seed=2).joinpath(workdir_lib.METRICS).unlink()
    (make("crashed", seed=3) / workdir_lib.ERROR).write_text("Traceback\nMemoryError: no more\n")
    (make("recovered", 0.7, seed=4) / workdir_lib.ERROR).write_text("an earlier one\n")
    diverged = make("diverged", 0.1, seed=5)
    result = json.loads((diverged / workdir_lib.RESULT).read_text()) | {"eval/loss": math.nan}
    workdir_lib.write_result(diverged, result)
    failed_early = tmp_path / "runs/early"
    failed_early.mkdir()
    (failed_early / workdir_lib.ERROR).write_text("error: config.train.epochs 0 must be more.\n")
    last = runs_lib.read(unfinished).metrics[-1]
    assert notes(tmp_path) == {
        "unfinished": f"running or interrupted: step {last['step']}, epoch 1 of 2.",
        "queued": "running or interrupted: no metrics yet.",
        "crashed": "failed: MemoryError: no more",
        "diverged": "failed: eval/loss is nan.",
        "early": "failed: error: config.train.epochs 0 must be more.",
    }


def test_a_loss_that_is_not_finite_is_a_failure(make, tmp_path):
    path = make("diverged")
    with (path / workdir_lib.METRICS).open("a") as file:
        file.write('{"step": 9, "epoch": 4.5, "train/loss": NaN}\n')
    assert notes(tmp_path)["diverged"].startswith("failed: train/loss is nan at step 9, epoch 4.5")


def test_a_step_whose_numbers_are_not_finite_is_a_failure_until_the_run_is_past_it(make, tmp_path):
    path = make("diverged", epochs=3.0)
    last = runs_lib.read(path).metrics[-1]["step"]
    failure = {"step": last + 1, "loss": math.nan, "grad_norm": math.inf, "indices": []}
    (path / workdir_lib.FAILURE).write_text(json.dumps(failure))
    said = f"failed: step {last + 1} has loss nan and a gradient of norm inf."
    assert notes(tmp_path) == {"diverged": said}
    (path / workdir_lib.FAILURE).write_text(json.dumps(failure | {"step": last}))
    assert notes(tmp_path)["diverged"].startswith("running or interrupted: step")
    (path / workdir_lib.FAILURE).write_text("")
    assert notes(tmp_path)["diverged"].startswith("running or interrupted: step")


def test_a_line_that_is_none_is_left_out_and_named(make, tmp_path):
    path = make("torn", epochs=3.0) / workdir_lib.METRICS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "\0\0\n", *lines[1:]]))
    said = notes(tmp_path)["torn"]
    assert said.startswith("running or interrupted: step")
    assert "metrics.jsonl, line 2, is left out: " in said
    assert len(runs_lib.read(path.parent).metrics) == len(lines)


def test_a_table_goes_where_it_is_asked_for(make, tmp_path, capsys):
    path = make("one", 0.5).parent
    link = tmp_path / "null.csv"
    link.symlink_to("/dev/null")
    assert main([str(path), f"--csv={link}"]) == 0
    assert link.is_char_device()
    (tmp_path / "folder").mkdir()
    for flag in ("csv", "html", "markdown"):
        with pytest.raises(SystemExit) as end:
            main([str(path), f"--{flag}={tmp_path}/folder"])
        assert end.value.code == 2
        assert f"{tmp_path}/folder cannot be written: Is a directory." in capsys.readouterr().err
    assert {entry.name for entry in tmp_path.iterdir()} == {"runs", "null.csv", "folder"}


def test_errors_of_test_images_have_columns_where_runs_validated_on_others(make, tmp_path):
    make("a", 0.5)
    assert not any("test" in heading for heading in table.headings(compare(tmp_path / "runs")))
    for seed, top1 in enumerate((0.4, 0.6)):
        path = make(f"b{seed}", 0.5, seed=seed, data__val_share=0.1)
        result = json.loads((path / "result.json").read_text())
        tested = {"test/top1": top1, "best/test_top1": top1 + 0.1}
        (path / "result.json").write_text(json.dumps(result | tested))
    found = compare(tmp_path / "runs")
    assert table.headings(found)[1:6] == [
        *("n", "final error, %", "best error, %", "final test error, %", "best test error, %")
    ]
    assert [row[4:6] for row in table.rows(found)] == [
        ["", ""],
        ["50.00 ± 14.14", "40.00 ± 14.14"],
    ]
    assert table.TEST_LEGEND in table.legend(found)
    names, _, tested = (line.split(",") for line in table.comma_separated(found).splitlines())
    assert tested[names.index("test_top1_error_percent_mean")] == "50.0"
    (path / "result.json").write_text(json.dumps(result | {"test/top1": 1.5}))
    assert "test/top1 1.5 is not from 0 to 1" in notes(tmp_path / "runs")["b1"]


DAMAGE = {
    "config.json": [
        '{"mod',
        "[]",
        '{"model": {"depht": 3}}',
        "\xff\xfe",
        '{"seed": "x"}',
        '{"data": {"mean": [[1]]}}',
    ],
    "dataset.json": ['{"name"', "[]", '{"name": 3}'],
    "metrics.jsonl": ['{"step": 1\n{}\n', "[]\n[]\n"],
    "result.json": ['{"eval', "[]", "{}", '{"eval/top1": 7, "best/top1": 1, "seconds": 1}'],
}


@pytest.mark.first(3)
@pytest.mark.parametrize(("name", "text"), [(n, text) for n in DAMAGE for text in DAMAGE[n]])
def test_a_damaged_file_is_named(make, tmp_path, name, text, capsys):
    (make("broken", 0.5) / name).write_bytes(text.encode("latin-1"))
    make("whole", 0.5, seed=1)
    said = notes(tmp_path)
    assert set(said) == {"broken"}
    assert name in said["broken"]
    assert said["broken"].count("broken") <= 1  # the path is said by who prints the note
    assert main([str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "runs/broken: " in output
    # What does not need the file is there all the same.
    counts = 2 if name in ("dataset.json", "metrics.jsonl") else 1
    assert sum(len(group.finished) for group in compare(tmp_path).groups) == counts


@pytest.mark.parametrize(
    ("shape", "right"),
    [
        ([16, "x", 3], "dataset.json cannot be read: image_shape (16, 'x', 3) must be height"),
        ([1000, 1000, 3], "cannot be counted"),
    ],
)
def test_a_data_set_that_no_network_fits_is_named(make, tmp_path, shape, right):
    path = make("broken", 0.5)
    description = json.loads((path / "dataset.json").read_text()) | {"image_shape": shape}
    (path / "dataset.json").write_text(json.dumps(description))
    assert right in notes(tmp_path)["broken"]


def test_files_of_a_run_without_its_config_are_named(make, tmp_path):
    (make("lost", 0.5) / workdir_lib.CONFIG).unlink()
    assert notes(tmp_path) == {"lost": "damaged: config.json is missing."}


def test_seconds_are_those_of_all_starts(make):
    path = make("resumed", 0.5)
    lines = [(1, 10.0), (2, 20.0), (3, 5.0), (4, 15.0)]
    text = "".join(json.dumps({"step": s, "epoch": s / 2, "time": t}) + "\n" for s, t in lines)
    (path / workdir_lib.METRICS).write_text(text)
    assert runs_lib.read(path).seconds == 20.0 + 60.0
    result = json.loads((path / workdir_lib.RESULT).read_text()) | {"seconds": 3.0}
    workdir_lib.write_result(path, result)  # of a start that had nothing left to do
    assert runs_lib.read(path).seconds == 20.0 + 15.0


def small_sweep(make):
    for depth in (8, 20):
        for shortcut in ("A", "B"):
            for seed in (0, 1):
                make(
                    f"{depth}{shortcut}{seed}",
                    0.5 + 0.01 * depth + 0.02 * seed,
                    seed=seed,
                    model__depth=depth,
                    model__shortcut=shortcut,
                )


@pytest.mark.long
def test_the_report_writes_tables_and_pictures(make, tmp_path, capsys):
    small_sweep(make)
    out = tmp_path / "out"
    flags = [f"--{name}={out}/report.{name}" for name in ("markdown", "html", "csv")]
    assert main([str(tmp_path / "runs"), *flags, f"--plots={out}/plots"]) == 0
    output = capsys.readouterr().out
    pictures = sorted(path.name for path in (out / "plots").iterdir())
    assert pictures == [
        "accuracy_by_depth.png",
        "accuracy_by_shortcut.png",
        "curves_by_depth.png",
        "curves_by_shortcut.png",
        "heat_map_depth_shortcut.png",
    ]
    for name in pictures:
        pixels = matplotlib.image.imread(out / "plots" / name)
        assert pixels.shape[1] == 1050  # a column of a page at 300 dots an inch
        assert (pixels[..., :3].min(axis=-1) < 0.95).mean() > 0.01
    rows = list(csv.DictReader((out / "report.csv").read_text().splitlines()))
    assert len(rows) == 4
    assert (rows[1]["model.depth"], rows[1]["model.shortcut"]) == ("8", "B")
    assert float(rows[1]["final_top1_error_percent_mean"]) == pytest.approx(41.0)
    assert rows[1]["n"] == "2"
    line = f"| 8 | B | 2 | 41.00 ± 1.41 | 31.00 ± 1.41 | {int(rows[1]['params']):,} |"
    page = (out / "report.markdown").read_text()
    assert line in page
    assert "![curves_by_depth.png](<plots/curves_by_depth.png>)" in page
    web = (out / "report.html").read_text()
    assert re.search(r"<td>41.00 ± 1.41</td>", web)
    assert '<img src="plots/curves_by_depth.png"' in web
    assert "41.00 ± 1.41" in output
    assert str(out / "plots/curves_by_depth.png") in output


def test_what_a_file_says_is_text_in_every_format(make, tmp_path, capsys):
    path = make("<b>|[red]", 0.5, init_from="<i>|[/red]*")
    (make("other", seed=1) / workdir_lib.ERROR).write_text("[/bold] <script> | x\n")
    files = {name: tmp_path / name for name in ("markdown", "html")}
    assert main([str(path.parent), *(f"--{n}={f}" for n, f in files.items())]) == 0
    assert "[/bold] <script> | x" in capsys.readouterr().out
    web, page = (files[name].read_text() for name in ("html", "markdown"))
    assert "<script>" not in web
    assert "<i>" not in web
    assert "\\<i\\>\\|\\[/red\\]\\*" in page


def test_what_all_runs_say_is_text_in_the_title_and_the_summary(tmp_path):
    for seed in (0, 1):
        text = config_lib.to_json(network(seed=seed))
        (tmp_path / f"run{seed}").mkdir()
        (tmp_path / f"run{seed}" / workdir_lib.CONFIG).write_text(
            text.replace('"cifar_resnet20"', '"<script>\\n\\n# |"')
        )
    files = {name: tmp_path / name for name in ("markdown", "html")}
    assert main([str(tmp_path), *(f"--{n}={f}" for n, f in files.items())]) == 0
    web, page = (files[name].read_text() for name in ("html", "markdown"))
    assert "<script>" not in web
    assert web.count("# | on shapes: 2 runs") == 2
    assert page.startswith("\\<script\\> # \\| on shapes: 2 runs")


def figures(path):
    return dict(plots.draw(compare(path)))


@pytest.mark.long
def test_cost_panels_have_the_means_of_the_finished_runs(make, tmp_path):
    small_sweep(make)
    compared = compare(tmp_path)
    params, macs = figures(tmp_path)["accuracy_by_shortcut"].axes
    assert params.get_xlabel() == "parameters (thousands)"
    assert macs.get_ylabel() == "top-1 accuracy (%)"
    drawn = sorted(
        (x * 1000, y) for line in params.containers for x, y in line.lines[0].get_xydata()
    )
    expected = sorted((group.size.params, group.accuracy.mean) for group in compared.groups)
    assert drawn == [pytest.approx(point) for point in expected]
    # Depth is a number, so what differs in it alone is joined; shortcuts are not.
    assert {line.lines[0].get_linestyle() for line in params.containers} == {"-"}
    by_depth = figures(tmp_path)["accuracy_by_depth"].axes[0]
    assert {line.lines[0].get_linestyle() for line in by_depth.containers} == {"None"}


def test_without_a_difference_in_cost_there_is_no_such_figure(make, tmp_path):
    for lr in (0.1, 0.2):
        make(f"{lr}", lr, optim__lr=lr)
    assert list(figures(tmp_path)) == ["curves_by_lr"]


def test_curves_are_means_with_bands_and_dashed_where_nothing_is_finished(make, tmp_path):
    for seed, top1 in enumerate((0.2, 0.4)):
        path = make(f"a{seed}", 0.5, seed=seed, optim__lr=0.1)
        line = {"step": 2, "epoch": 1.0, "time": 1.0, "eval/loss": 1.0, "eval/top1": top1}
        (path / workdir_lib.METRICS).write_text(json.dumps(line) + "\n")
    make("b", optim__lr=0.2)
    (panel,) = figures(tmp_path)["curves_by_lr"].axes
    first, second = panel.lines
    assert first.get_xydata().tolist() == [[1.0, pytest.approx(30.0)]]
    band = panel.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((30 - 10 * 2**0.5, 30 + 10 * 2**0.5))
    assert (first.get_linestyle(), second.get_linestyle()) == ("-", "--")


@pytest.mark.long
def test_the_heat_map_has_a_number_for_each_cell_that_has_one(make, tmp_path):
    small_sweep(make)
    for path in (tmp_path / "runs").glob("20B*"):
        (path / workdir_lib.RESULT).unlink()
    panel = figures(tmp_path)["heat_map_depth_shortcut"].axes[0]
    texts = {text.get_position(): text.get_text() for text in panel.texts}
    assert texts == {
        (0, 0): "59.00\n± 1.41",
        (1, 0): "59.00\n± 1.41",
        (0, 1): "71.00\n± 1.41",
    }


@pytest.mark.long
def test_a_cell_tells_of_the_configurations_that_it_lacks(make, tmp_path):
    small_sweep(make)
    for path in (tmp_path / "runs").glob("*"):
        copy = path.with_name(path.name + "se")
        shutil.copytree(path, copy)
        config = json.loads((copy / workdir_lib.CONFIG).read_text())
        config["model"]["se_reduction"] = 8
        (copy / workdir_lib.CONFIG).write_text(json.dumps(config))
    for seed in (0, 1):
        (tmp_path / f"runs/8A{seed}/result.json").unlink()
    panel = figures(tmp_path)["heat_map_depth_shortcut"].axes[0]
    assert sorted(text.get_text() for text in panel.texts) == [
        "59.00",
        "59.00\n(1 of 2)",
        "71.00",
        "71.00",
    ]


@pytest.mark.long
def test_long_names_and_numbers_do_not_overlap(make, tmp_path):
    for number in range(9):
        for unit in ("original", "full_preact", "relu_before_addition"):
            name = f"{number}{unit}"
            make(name, 0.5 + number / 100, optim__clip_norm=number / 8, model__unit=unit)
    figure = figures(tmp_path)["heat_map_unit_clip_norm"]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    panel = figure.axes[0]
    texts = [*panel.texts, *panel.get_xticklabels(), *panel.get_yticklabels()]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    assert len(boxes) == 27 + 9 + 3
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@pytest.mark.long
@pytest.mark.parametrize("width", [30, 60, 78])
def test_a_narrow_terminal_loses_nothing(make, tmp_path, width):
    small_sweep(make)
    text = io.StringIO()
    table.show(compare(tmp_path), rich.console.Console(file=text, width=width, force_terminal=True))
    for part in ("depth,", "shortcut", "20, B", "19.00", "29.00", "60.0", "1.41", "MACs"):
        assert part in text.getvalue()


@pytest.mark.long
def test_many_panels_go_on_a_second_figure(make, tmp_path):
    for clip in range(26):
        for decay in (0.0, 0.1):
            make(f"{clip},{decay}", 0.5, optim__clip_norm=float(clip), optim__weight_decay=decay)
    names = list(figures(tmp_path))
    assert {"curves_by_weight_decay_1", "curves_by_weight_decay_2", "curves_by_clip_norm"} < {
        *names
    }


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ([], "DIR"),
        (["{}/nowhere"], "nowhere is not a directory"),
        (["{}"], "holds no run"),
        (["{}/runs", "{}/runs/file"], "file is not a directory"),
        (["{}/runs", "--csv={}/runs"], "runs cannot be written: Is a directory"),
        (["{}/runs", "--markdown={}/runs/file/x.md"], "file: "),
        (["{}/runs", "--plots={}/runs/file"], "file: File exists"),
        (["{}/runs", "--plot={}"], "--plot="),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(make, tmp_path, arguments, right, capsys):
    if arguments != ["{}"]:
        make("run", 0.5)
        (tmp_path / "runs/file").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(tmp_path) for argument in arguments])
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert right in errors
    if arguments != ["{}"]:
        assert (tmp_path / "runs/file").read_text() == "mine"


@pytest.mark.long
def test_the_command_line_reports_a_run(trained):
    process = subprocess.run(
        [sys.executable, "-m", "resflax.report", str(trained[0])],
        cwd=pathlib.Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cifar_resnet20 on shapes: 1 run of 1 configuration, 1 finished" in process.stdout
    assert process.stderr == ""
