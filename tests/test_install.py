"""Tests of an editable install, as `pip install -e .` makes it in a clone."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent

BUILD = "from setuptools import build_meta; build_meta.build_editable({!r})"
USE = "import site; site.addsitedir({!r}); import resflax; print(resflax.__version__)"


@pytest.mark.long
def test_the_folder_above_a_clone_does_not_hide_the_package(tmp_path):
    pytest.importorskip("setuptools", "77")
    clone, wheels, installed = (tmp_path / name for name in ("resflax", "wheels", "installed"))
    shutil.copytree(ROOT / "resflax", clone / "resflax")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    wheels.mkdir()
    build = [sys.executable, "-c", BUILD.format(str(wheels))]
    subprocess.run(build, cwd=clone, check=True, capture_output=True)
    (wheel,) = wheels.iterdir()
    zipfile.ZipFile(wheel).extractall(installed)
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    use = [sys.executable, "-c", USE.format(str(installed))]
    result = subprocess.run(use, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout, result.stderr
