"""Tests of `python -m resflax.models`."""

import re
import subprocess
import sys

import pytest

import resflax
from resflax.models import axes
from resflax.models.__main__ import as_published, main, read_parity


def _printed(capsys, *argv):
    assert main(argv) == 0
    return capsys.readouterr().out


def _rows(text):
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}


# --- arguments -----------------------------------------------------------------------------------


def test_the_arguments_have_the_names_of_their_tables(capsys):
    lines = _printed(capsys, "se_resnet50", "--arguments").splitlines()
    rows = {line.split()[0]: line.split(maxsplit=1)[1:] for line in lines if line}
    assert rows["depth"] == ["50"]
    assert rows["se_reduction"] == ["16"]
    for axis, table in axes.TABLES.items():
        assert all(repr(name) in rows[axis][0] for name in table)
    assert rows["shortcut"][0].endswith("'none', a constructor")
    assert rows["act"][0].endswith("'silu', a function")
    assert "growth_rate" in _printed(capsys, "densenet121", "--arguments")


# --- the list ------------------------------------------------------------------------------------


def test_the_list_has_counts_and_published_errors(capsys):
    rows = _rows(_printed(capsys, "cifar_resnet[2-5]*"))
    assert rows["cifar_resnet20"] == ["32", "269,722", "0.0406", "8.75"]
    assert rows["cifar_resnet56"] == ["32", "853,018", "0.1255", "6.97"]


@pytest.mark.long
def test_the_list_is_blank_where_no_error_is_published(capsys):
    rows = _rows(_printed(capsys, "resnet1*"))
    assert rows["resnet101"] == ["224", "44,549,160", "7.8014", "22.626", "6.454"]
    assert rows["resnet18"] == ["224", "11,689,512", "1.8141"]


@pytest.mark.parametrize(
    ("name", "top1"),
    [
        ("cifar_resnet110", "6.61"),  # not 6.43, which says shortcut A
        ("cifar_resnet20", "8.75"),  # says shortcut A, which it has anyway
        ("cifar_preact_resnet164", "5.46"),  # 10 classes, not 100
        ("cifar_plain110", ">60"),
        ("resnet34", "24.52"),
    ],
)
def test_errors_are_those_of_the_network_as_named(name, top1):
    assert as_published(name).top1 == top1


def test_errors_of_other_strides_are_not_the_networks():
    assert as_published("se_resnet50") is None


def test_markdown(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = _printed(capsys, "cifar_resnet2?", "--markdown").splitlines()
    assert lines == [
        "| network | image | parameters | 10^9 MACs | top-1, % | top-5, % |",
        "|---|---:|---:|---:|---:|---:|",
        "| `cifar_resnet20` | 32 | 269,722 | 0.0406 | 8.75 |  |",
    ]


def test_markdown_has_the_parity_that_was_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "parity.csv").write_text(
        "model,library,difference,more\n"
        "cifar_resnet20,timm,1e-6,\n"
        "cifar_resnet20,torchvision,2.4e-6,\n"
    )
    (tmp_path / "results" / "parity_keras.csv").write_text(
        "model,library,difference\ncifar_resnet20,keras,5e-7\n"
    )
    lines = _printed(capsys, "cifar_resnet[23]*", "--markdown").splitlines()
    assert [line.split("|")[-2].strip() for line in lines] == [
        "parity",
        "---:",
        "2e-06 (torchvision)",
        "",
    ]


def test_parity_is_read_leniently(tmp_path):
    path = tmp_path / "parity.csv"
    path.write_text(
        "difference,model,library\n,a,timm\nfailed,a,timm\n3e-5\n1e-5,b,timm\n2e-5,b,keras\n"
        "nan,c,timm\n1,c,keras\n4e-3,d\n"
    )
    assert read_parity([path]) == {"b": "2e-05 (keras)", "c": "inf (timm)", "d": "4e-03"}
    path.write_text("model,library\na,timm\n")
    assert read_parity([path]) == {}


# --- the table of one network --------------------------------------------------------------------


def test_the_table_has_every_module(capsys):
    text = _printed(capsys, "se_resnet18", "--table")
    lines = text.splitlines()
    assert lines[0] == "se_resnet18, an image of 224 x 224 x 3"
    names = [re.match(r" *\w+", line)[0] for line in lines[4:] if line.startswith((" ", "stage2"))]
    block = ["  conv1", "  norm1", "  conv2", "  norm2", "  se", "    squeeze", "    excite"]
    assert names[2:18] == [name for i in (1, 2) for name in (f"stage2_block{i}", *block)]
    rows = _rows(text)
    assert rows["stem"] == ["56", "x", "56", "x", "64", "9,536", "118,013,952", "802,816"]
    assert rows["total"] == ["1000", "11,778,592", "1,814,160,384", "2,486,752"]


@pytest.mark.long
def test_the_table_ends_with_the_memory_of_the_batch(capsys):
    model = resflax.create_model("cifar_resnet20")
    for options, batch_size, images in (([], 1, "1 image"), (["--batch", "3"], 3, "3 images")):
        last = _printed(capsys, "cifar_resnet2?", "--table", *options).splitlines()[-1]
        memory = resflax.count(model, (32, 32, 3), batch_size).activation_memory
        assert last == (
            f"activation memory of a training step on {images}: "
            f"{memory / 2**20:.2f} MiB ({memory:,} bytes)"
        )


@pytest.mark.first(1)
@pytest.mark.parametrize("argv", [["vgg1*"], ["googlenet", "--table"], ["vgg16", "--table"]])
def test_lines_fit_into_100_columns(capsys, argv):
    assert max(map(len, _printed(capsys, *argv).splitlines())) <= 100


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["resnet5"], "no network matches 'resnet5'; the closest are .*resnet50"),
        (["se_resnxt50_32x4d", "--table"], "the closest are se_resnext50_32x4d"),
        (["*zz*"], "no network matches .*without a pattern all are listed"),
        (["vgg*", "--table"], "takes one network; 'vgg.' matches 8: vgg11, vgg11_bn, vgg13"),
        (["resnet18", "--batch", "4"], "--batch .* with --table"),
        (["resnet18", "--table", "--batch", "0"], "1 or more"),
        (["resnet18", "--table", "--batch", "x"], "--batch: invalid int"),
        (["--table", "--markdown"], "not allowed with"),
        (["--colour"], "--colour"),
    ],
)
def test_errors_are_one_line(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert re.fullmatch(f"error: .*{message}.*\n", err)


@pytest.mark.long
def test_a_reader_may_stop_reading():
    command = [sys.executable, "-m", "resflax.models", "cifar_plain*"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith(b"network")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
