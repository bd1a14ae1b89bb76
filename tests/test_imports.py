"""Imports point down only: this table is the architecture."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "resflax"

# What each part of the package imports of the others, beside errors; no more than this.
ARROWS = {
    "errors": set(),
    "process": set(),
    "run": set(),
    "disk": set(),
    "compat": set(),
    "process.entry": set(),
    "process.runtime": set(),
    "process.arguments": set(),
    "process.distributed": {"compat"},
    "process.program": set(),
    "process.command": {"config", "models", "parts", "process.arguments", "process.program"},
    "ops": set(),
    "models": {"compat", "ops"},
    "metrics": set(),
    "train_state": {"models"},
    "signature": set(),
    "losses": {"signature", "metrics"},
    "steps": {"losses", "metrics", "train_state"},
    "parallel": set(),
    "optimizers": {"signature"},
    "figures": {"disk"},
    "data": {"process.arguments"},
    "config": {"signature", "losses", "models", "optimizers"},
    "parts": {"config", "data", "losses", "process.program"},
    "validation": {
        "config", "signature", "data", "losses", "models", "optimizers", "parallel",
    },
    "interop": {"models", "process.arguments"},
    "run.lock": set(),
    "run.interruption": {"process.entry"},
    "run.curves": {"figures"},
    "run.workdir": {"config", "data", "disk"},
    "run.console": {"models"},
    "run.calendar": set(),
    "run.summary": {"config", "data", "models", "parallel", "parts", "run.console", "run.workdir"},
    "run.writers": {"run.curves", "run.workdir"},
    "run.progress": {"metrics", "run.console", "run.writers"},
    "checkpoint": {
        "config", "data", "disk", "models", "parts", "process.arguments", "process.distributed",
        "run.workdir", "train_state", "validation",
    },
    "run.failure": {"checkpoint", "data", "run.progress", "run.workdir", "train_state"},
    "evaluate": {
        "checkpoint", "data", "metrics", "models", "parallel", "parts", "process.arguments",
        "process.distributed", "process.runtime", "steps", "train_state",
    },
    "transfer": {
        "checkpoint", "config", "data", "interop", "models", "parts", "process.arguments",
        "run.workdir", "train_state",
    },
    "build": {
        "data", "losses", "optimizers", "parallel", "parts", "run.calendar", "steps",
        "train_state", "transfer",
    },
    "analysis": {
        "checkpoint", "config", "data", "figures", "metrics", "models", "ops", "parts",
        "run.workdir", "validation",
    },
    "analyze": {"analysis", "parts", "process.arguments", "process.command", "process.runtime"},
    "train": {
        "analysis", "build", "checkpoint", "config", "data", "evaluate", "models", "optimizers",
        "parallel", "parts", "process.distributed", "run.calendar", "run.console",
        "run.failure", "run.interruption", "run.lock", "run.progress", "run.summary",
        "run.workdir", "run.writers", "train_state", "transfer", "validation",
    },
    "run.replay": {
        "build", "checkpoint", "config", "optimizers", "parallel", "parts", "process.distributed",
        "run.console", "run.failure", "run.lock", "run.workdir", "train", "validation",
    },
    "report": {"config", "data", "figures", "models", "parts", "run.curves", "run.workdir"},
    "bench": {
        "checkpoint", "data", "interop", "models", "ops", "process.arguments", "process.runtime",
        "steps", "train_state",
    },
    "main": {
        "process.arguments", "process.command", "process.distributed", "process.runtime",
        "run.interruption", "run.progress", "run.replay", "train",
    },
    # A package's command stands above the package.
    "checkpoint.__main__": {
        "checkpoint", "process.arguments", "process.command", "run.lock", "run.workdir",
    },
    "models.__main__": {"models", "process.arguments"},
    "data.__main__": {
        "data", "process.arguments", "process.command", "process.runtime", "validation",
    },
    "report.__main__": {
        "parts", "process.arguments", "process.command", "report", "run.workdir",
    },
    "__init__": {
        "checkpoint", "data", "interop", "losses", "models", "parts", "process.arguments",
        "process.entry", "process.runtime", "train",
    },
}  # fmt: skip

# Packages of modules that have arrows of their own.
ROOMS = {"resflax", "resflax.process", "resflax.run"}

# A script that restores a checkpoint starts in the time jax takes.
LIGHT = {"ops", "models", "metrics", "losses", "train_state", "steps"}
HEAVY = {"tensorflow", "tensorflow_datasets", "ml_collections", "absl", "orbax", "sklearn"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module in ROOMS:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def part(module):
    """The part that a module, named without the package, belongs to."""
    names = module.split(".")
    return next((name for name in (module, ".".join(names[:2])) if name in ARROWS), names[0])


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = part(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    names = list(imports(path))
    used = {part(name.removeprefix("resflax.")) for name in names if name.startswith("resflax.")}
    assert used - {own} <= {"errors"} | ARROWS[own]
    libraries = {name.partition(".")[0] for name in names}
    if own in LIGHT:
        assert not HEAVY & libraries
    if own == "ops":
        assert libraries - set(sys.stdlib_module_names) <= {"jax", "numpy", "resflax"}


def test_there_is_no_circle():
    assert set(graphlib.TopologicalSorter(ARROWS).static_order()) == set(ARROWS)


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
