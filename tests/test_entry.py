"""Tests of Ctrl-C from the first import of a command line on, in real processes."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import forked
import pytest

ROOT = pathlib.Path(__file__).parent.parent

COMMANDS = (
    ("resflax.main", "--config", "tests/plain.py", "--workdir", "/dev/null/none"),
    ("resflax.evaluate", "--workdir", "none"),
    ("resflax.analyze", "signal", "--model", "cifar_resnet20"),
    ("resflax.report", "none"),
    ("resflax.data", "show", "--config", "tests/plain.py"),
    ("resflax.checkpoint", "list", "none"),
    ("resflax.models",),
    ("resflax.bench", "--model", "cifar_resnet20"),
    ("launch.sweep", "--config", "tests/plain.py", "--workdir", "none"),
)


# Where the tests run in the background, processes may ignore SIGINT; this one does not.
UNIGNORED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def interrupted(command, seconds, module="-m"):
    """Exit code and errors of a command line that is interrupted so long after its first import."""
    process = subprocess.Popen(
        [sys.executable, "-c", UNIGNORED, "-X", "importtime", module, *command],
        cwd=ROOT,
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.rpartition("|")[2].strip() == "resflax.process.entry":
            break
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    own = [line for line in errors.splitlines(True) if not line.startswith("import time:")]
    return process.returncode, "".join(own)


@pytest.mark.parametrize("command", COMMANDS[:1])
def test_ctrl_c_at_the_first_import_is_one_line(command):
    assert interrupted(command, 0.0) == (130, "stopped.\n")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_ctrl_c_at_any_moment_is_one_line(command):
    seed = time.time_ns()
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(5):
        code, errors = interrupted(command, rng.uniform(0, 5))
        if code != 2:  # it had come to what is wrong with its arguments
            # While the interpreter ends, Ctrl-C has its default again.
            assert code in (0, 130, -signal.SIGINT)
            assert "Traceback" not in errors
            assert code == 0 or errors.count("stopped") <= 1


def test_a_program_that_imports_the_package_keeps_its_own_ctrl_c():
    code = "import signal, resflax; print(signal.getsignal(signal.SIGINT))"
    command = [sys.executable, "-c", UNIGNORED, "-c", code, "-m", "resflax.main"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "default_int_handler" in output


SWALLOWED = """
import os, signal, time
from resflax.process import entry
signal.signal(signal.SIGINT, entry._interrupt)
entry._PATIENCE = 0.2
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    time.sleep(100)
"""

CONVERTED = """
import os, signal
from resflax.process import entry
signal.signal(signal.SIGINT, entry._interrupt)
try:
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ValueError("metadata cannot be compared") from error
except ValueError as error:
    entry._show(ValueError, error, None)
"""

IN_A_CALLBACK = """
import os, signal, sys, time
from resflax.process import entry
signal.signal(signal.SIGINT, entry._interrupt)
sys.unraisablehook = entry._end_unraised

class Owner:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

owner = [Owner()]
del owner[0]
time.sleep(100)
"""


@pytest.mark.parametrize("code", [SWALLOWED, CONVERTED, IN_A_CALLBACK])
def test_an_interrupt_that_a_library_catches_ends_the_process_too(code):
    result = forked.run("-c", code)
    assert (result.code, result.errors) == (130, "stopped.\n")
