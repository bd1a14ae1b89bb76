import pytest

from launch import sweep


def write_config(tmp_path, body):
    path = tmp_path / "config.py"
    path.write_text(body)
    return path


SWEEP = """
def sweep():
    for depth in (8, 14):
        yield {"model.depth": depth, "optim.lr": 0.1}
"""


def test_runs_are_named_after_what_varies(tmp_path):
    runs = list(sweep.expand(write_config(tmp_path, SWEEP)))
    assert runs[0] == ("depth=8,lr=0.1", ["--config.model.depth=8", "--config.optim.lr=0.1"])
    assert runs[1][0] == "depth=14,lr=0.1"


def test_commands_are_printed_one_a_line(tmp_path, capsys):
    config = write_config(tmp_path, SWEEP)
    arguments = ["--config", f"{config}:shapes", "--workdir", "runs", "--executor", "print"]
    assert sweep.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert f"--config {config}:shapes --config.model.depth=8" in lines[0]
    assert lines[0].endswith("--workdir runs/depth=8,lr=0.1")


def test_finished_runs_are_skipped_and_failed_ones_counted(tmp_path, capfd):
    config = write_config(tmp_path, SWEEP)
    (tmp_path / "depth=8,lr=0.1").mkdir()
    (tmp_path / "depth=8,lr=0.1/result.json").write_text("{}")
    # The config has no get_config, so the other run fails.
    assert sweep.main(["--config", str(config), "--workdir", str(tmp_path)]) == 1
    output, errors = capfd.readouterr()
    assert "[1/2] depth=8,lr=0.1: finished before" in output
    assert "get_config" in errors


@pytest.mark.parametrize("body", [None, "x = 1"])
def test_a_config_without_a_sweep_is_refused(tmp_path, body, capsys):
    path = tmp_path / "none.py" if body is None else write_config(tmp_path, body)
    with pytest.raises(SystemExit) as exit_code:
        sweep.main(["--config", str(path), "--workdir", str(tmp_path)])
    assert exit_code.value.code == 2
    assert "error: " in capsys.readouterr().err
