"""Runs a config's sweep: python -m launch.sweep --config configs/resnet.py[:shapes] --workdir DIR.

Each combination that the config's `sweep()` yields becomes a run in DIR, named after its values.
Finished runs are skipped and interrupted ones go on, so the same command completes a sweep.
"""

import argparse
import importlib.util
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any


def expand(config_file: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
    """The runs of a config file's `sweep()`.

    Yields:
      The run's name, such as 'depth=20,shortcut=A', and its flags for resflax.main.

    Raises:
      ValueError: if the file is not there or has no sweep.
    """
    spec = importlib.util.spec_from_file_location("config", config_file)
    if spec is None or spec.loader is None or not config_file.is_file():
        raise ValueError(f"--config: there is no file {config_file}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise ValueError(f"{config_file} has no sweep().")
    for overrides in module.sweep():
        yield name(overrides), [f"--config.{field}={value}" for field, value in overrides.items()]


def name(overrides: dict[str, Any]) -> str:
    """A directory's name for the overrides: the last part of each field, and its value."""
    return ",".join(f"{field.split('.')[-1]}={value}" for field, value in overrides.items())


def main(argv: list[str] | None = None) -> int:
    """Runs the sweep; returns the number of runs that failed, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:DATASET")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="of all the runs")
    parser.add_argument("--executor", choices=("local", "print"), default="local")
    arguments = parser.parse_args(argv)
    try:
        runs = list(expand(pathlib.Path(arguments.config.partition(":")[0])))
    except ValueError as error:
        parser.error(str(error))
    failed = 0
    for number, (run, flags) in enumerate(runs, 1):
        workdir = arguments.workdir / run
        command = [sys.executable, "-m", "resflax.main", "--config", arguments.config, *flags]
        command += ["--workdir", str(workdir)]
        if arguments.executor == "print":
            print(shlex.join(command))
        elif (workdir / "result.json").exists():
            print(f"[{number}/{len(runs)}] {run}: finished before")
        else:
            print(f"[{number}/{len(runs)}] {run}", flush=True)
            failed += subprocess.run(command, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
