"""Imports point down only: this table is the architecture."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "resflax"

# What each part of the package imports of the others, beside errors; no more than this.
ARROWS = {
    "errors": set(),
    "disk": set(),
    "arguments": set(),
    "ops": set(),
    "models": {"compat", "ops"},
    "metrics": set(),
    "runtime": set(),
    "lock": set(),
    "entry": set(),
    "interruption": {"entry"},
    "failure": {"checkpoint", "data", "progress", "train_state", "workdir"},
    "compat": set(),
    "processes": {"compat"},
    "train_state": {"models"},
    "steps": {"metrics", "train_state"},
    "parallel": set(),
    "optimizers": set(),
    "figures": {"disk"},
    "curves": {"figures"},
    "data": {"arguments"},
    "config": {"models"},
    "validation": {"config", "data", "models", "parallel"},
    "workdir": {"config", "data", "disk"},
    "checkpoint": {
        "arguments", "config", "data", "disk", "models", "processes", "train_state", "validation",
        "workdir",
    },
    "evaluate": {
        "arguments", "checkpoint", "data", "metrics", "parallel", "runtime", "steps",
        "validation",
    },
    "transfer": {
        "arguments", "checkpoint", "config", "data", "interop", "models", "train_state",
    },
    "console": {"models"},
    "writers": {"curves", "workdir"},
    "progress": {"console", "metrics", "writers"},
    "assembly": {"data", "optimizers", "parallel", "steps", "train_state", "transfer"},
    "analysis": {
        "checkpoint", "config", "data", "figures", "metrics", "models", "ops", "validation",
        "workdir",
    },
    "analyze": {"analysis", "arguments", "command", "runtime"},
    "train": {
        "analysis", "assembly", "checkpoint", "config", "console", "data", "evaluate", "failure",
        "interruption", "lock", "models", "optimizers", "parallel", "processes", "progress",
        "train_state", "transfer", "validation", "workdir", "writers",
    },
    "replay": {
        "assembly", "checkpoint", "config", "console", "data", "failure", "lock", "optimizers",
        "parallel", "processes", "train", "validation", "workdir",
    },
    "interop": {"arguments", "models"},
    "report": {"config", "curves", "data", "figures", "models", "workdir"},
    "bench": {
        "arguments", "checkpoint", "data", "interop", "models", "ops", "runtime", "steps",
        "train_state",
    },
    "command": {"arguments", "config"},
    "main": {
        "arguments", "command", "interruption", "processes", "progress", "replay", "runtime",
        "train",
    },
    # What is run of a package stands above it.
    "checkpoint.__main__": {"arguments", "checkpoint", "command", "lock", "workdir"},
    "models.__main__": {"arguments", "models"},
    "data.__main__": {"arguments", "command", "data", "runtime", "validation"},
    "report.__main__": {"arguments", "command", "report", "workdir"},
    "__init__": {"checkpoint", "entry", "interop", "models"},
}  # fmt: skip

# A script that restores a checkpoint starts in the time jax takes.
LIGHT = {"ops", "models", "metrics", "train_state", "steps"}
HEAVY = {"tensorflow", "tensorflow_datasets", "ml_collections", "absl", "orbax", "sklearn"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "resflax":
                yield from (f"resflax.{alias.name}" for alias in node.names)
            else:
                yield node.module


def part(path):
    relative = path.relative_to(PACKAGE).with_suffix("")
    name = ".".join(relative.parts)
    return name if name in ARROWS else relative.parts[0]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = part(path)
    names = [name.split(".") for name in imports(path)]
    used = {name[1] for name in names if name[0] == "resflax" and len(name) > 1} - {own}
    assert used <= {"errors"} | ARROWS[own]
    if own in LIGHT:
        assert not HEAVY & {name[0] for name in names}
    if own == "ops":
        libraries = {name[0] for name in names} - set(sys.stdlib_module_names)
        assert libraries <= {"jax", "numpy", "resflax"}


def test_configs_import_only_the_base_config():
    for path in (PACKAGE.parent / "configs").glob("*.py"):
        assert {name for name in imports(path) if name.startswith("resflax")} == {"resflax.config"}


def test_launch_does_not_import_models():
    for path in (PACKAGE.parent / "launch").glob("*.py"):
        assert not any(name.startswith("resflax.models") for name in imports(path))


def test_importing_resflax_loads_nothing_heavy():
    code = f"import sys, resflax; print(*[m for m in {sorted(HEAVY)} if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    # flax itself may load absl and ml_collections; it is what a script pays for anyway.
    code = code.replace("resflax", "jax, flax.linen")
    paid = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(loaded) <= set(paid)
