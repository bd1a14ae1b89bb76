"""The README's list of networks is what its command prints."""

import pathlib

import pytest

import resflax
from resflax.models.__main__ import main, read_parity

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = README.split("<!-- networks -->\n")[1].split("<!-- end -->")[0]
ROWS = {
    cells[1].strip().strip("`"): [cell.strip() for cell in cells[2:-1]]
    for cells in (line.split("|") for line in TABLE.splitlines()[2:])
}


def test_every_network_is_listed():
    assert list(ROWS) == resflax.list_models()


def test_the_parity_is_the_measured_one():
    parity = read_parity((ROOT / "results").glob("parity*.csv"))
    assert {name: row[-1] for name, row in ROWS.items() if row[-1]} == parity
    assert max(float(text.split()[0]) for text in parity.values()) <= 1e-4


@pytest.mark.slow
def test_the_list_is_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["--markdown"]) == 0
    assert capsys.readouterr().out == TABLE
