"""Tests of where prepared data sets live, beside those of variables that are set to nothing."""

import os
import pathlib

import pytest

from resflax.data import location
from resflax.errors import UserError


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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_user_without_a_home_is_told_which_variable_to_set(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    for name in ("RESFLAX_DATA_DIR", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    os.setresuid(12345, -1, -1)  # which no name and no home belongs to
    try:
        with pytest.raises(UserError, match="RESFLAX_DATA_DIR names another one"):
            location.data_dir()
    finally:
        os.setresuid(0, -1, -1)
