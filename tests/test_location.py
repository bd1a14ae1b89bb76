"""Tests of where prepared data sets live, beside those of variables that are set to nothing."""

import pathlib

from resflax.data import location


def test_without_any_variable_it_is_in_the_home_directory_and_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RESFLAX_DATA_DIR", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert location.data_dir() == tmp_path / ".local/share/resflax"
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_in_the_shared_directory_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RESFLAX_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", "~/share")
    assert location.data_dir() == tmp_path / "share/resflax"


def test_the_own_variable_names_the_directory_itself_and_is_read_at_every_call(monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", "/share")
    for path in ("/data/first", "/data/second"):
        monkeypatch.setenv("RESFLAX_DATA_DIR", path)
        assert location.data_dir() == pathlib.Path(path)
