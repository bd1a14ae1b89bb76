"""The devices that tests run with, and the caches that all test processes share.

RESFLAX_TEST_DEVICES is the number of host devices. Unless it is set, `pytest` runs the tests with
one device, as the command lines have on a CPU, with compiled kernels; and then those that are
marked `devices(8)` or `devices(1, 8)` with eight.

Most of a test's time is XLA's compiler, so it optimises less than it would for a user, unless
XLA_FLAGS is set, if only to nothing: then it does what that says.

Compiled programs and kernels are kept in .pytest_cache/resflax, for the next time too.
"""

import collections
import fcntl
import gc
import importlib.metadata
import os
import pathlib
import subprocess
import sys

_ENVIRONMENT = dict(os.environ)
_VARIABLE = "RESFLAX_TEST_DEVICES"
_DEVICES = int(os.environ.get(_VARIABLE, "1"))
_USUAL_CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "resflax"
_CACHE = pathlib.Path(os.environ.get("RESFLAX_TEST_CACHE", _USUAL_CACHE))
_CACHE.mkdir(parents=True, exist_ok=True)

os.environ["XDG_CACHE_HOME"] = str(_CACHE)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Where in Python each operation of a program comes from, which no test asks.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
_QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jax").startswith("0.10."):  # an unknown flag ends the process
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
# On a busy machine devices may have to wait for each other for longer than the 40 seconds after
# which XLA ends the process.
_PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=300"
_COUNT = f"--xla_force_host_platform_device_count={_DEVICES}"
if "PYTEST_XDIST_WORKER" not in os.environ:  # it has those of the process that started it
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', _QUICK)} {_PATIENT} {_COUNT}"

import jax  # noqa: E402
import pytest  # noqa: E402

from resflax.ops import native  # noqa: E402
from resflax.process import runtime  # noqa: E402

runtime.configure()

# A silent broadcast over ranks is a bug more often than a wish.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes millions of objects; to look for cycles in them as often as Python would takes a
# tenth of the time.
gc.set_threshold(100_000, 50, 100)

_OTHERS = pytest.StashKey[set[str]]()  # files with selected tests that want eight devices


def pytest_configure(config: pytest.Config) -> None:
    """Compiles the kernels, in the first process that comes here."""
    config.stash[_OTHERS] = set()
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        with (_CACHE / "kernels.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            native.available()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the cases that are long, and leaves out the tests of other numbers of devices."""
    chosen, left_out = [], []
    cases = collections.Counter()
    for item in items:
        function = item.nodeid.split("[")[0]
        first = item.get_closest_marker("first")
        if first and cases[function] >= first.args[0]:
            item.add_marker(pytest.mark.long)
        cases[function] += 1
        mark = item.get_closest_marker("devices")
        devices = mark.args if mark else (1,)
        if mark and mark.kwargs.get("long") == _DEVICES:
            item.add_marker(pytest.mark.long)
        (chosen if _DEVICES in devices else left_out).append(item)
        if 8 in devices:
            config.stash[_OTHERS].add(str(item.path))
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tells the process that distributes the tests what was selected here."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["others"] = sorted(session.config.stash[_OTHERS])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Takes note of what was selected in a process that has ended."""
    node.config.stash[_OTHERS].update(getattr(node, "workeroutput", {}).get("others", ()))


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config):
    """Runs the tests with one device, and then those with eight."""
    code = yield
    if hasattr(config, "workerinput") or _VARIABLE in _ENVIRONMENT:
        return code
    goes_on = (
        (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if config.option.maxfail
        else (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
            pytest.ExitCode.TESTS_FAILED,
        )
    )
    others = config.stash.get(_OTHERS, set())
    if code not in goes_on or not others:
        return code
    sys.stdout.flush()
    # Where no file is named, it need not read them all.
    unnamed = config.args_source != pytest.Config.ArgsSource.ARGS
    files = sorted(others) if unnamed else []
    command = [sys.executable, "-m", "pytest", *config.invocation_params.args, *files]
    eight = subprocess.run(command, env=_ENVIRONMENT | {_VARIABLE: "8"}, check=False).returncode
    if code == pytest.ExitCode.TESTS_FAILED or eight == pytest.ExitCode.NO_TESTS_COLLECTED:
        return code
    return eight
