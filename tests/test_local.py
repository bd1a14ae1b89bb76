import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile

import pytest

from launch import local

ROOT = pathlib.Path(__file__).parent.parent

# A program that takes the flags of resflax.main, and meets the others by jax.
MEET = """
import argparse
import jax
parser = argparse.ArgumentParser()
parser.add_argument("--coordinator")
parser.add_argument("--num_processes", type=int)
parser.add_argument("--process_id", type=int)
flags = parser.parse_args()
if flags.coordinator:
    jax.distributed.initialize(flags.coordinator, flags.num_processes, flags.process_id)
print("devices", jax.process_index(), jax.local_device_count(), jax.device_count())
"""

# The second process does something; the others sleep.
OTHERS_SLEEP = """
import os, pathlib, signal, sys, time
print("ready", flush=True)
ready = pathlib.Path(os.environ["READY"])
(ready / str(os.getpid())).touch()
while len(list(ready.iterdir())) < int(os.environ["PROCESSES"]):
    time.sleep(0.01)
if sys.argv[-1] == "--process_id=1":
    {}
time.sleep(100)
"""


def start(*arguments, script="", processes=2, devices=1):
    options = ["--processes", str(processes), "--devices", str(devices)]
    command = [sys.executable, "-m", "launch.local", *options, "--"]
    command += arguments or [sys.executable, "-c", script]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "READY": tempfile.mkdtemp(),
            "PROCESSES": str(processes),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,  # as a shell's job
    )


def finish(process, timeout=60):
    output, errors = process.communicate(timeout=timeout)
    return process.returncode, sorted(output.splitlines()), errors


@pytest.mark.long
@pytest.mark.parametrize(("processes", "devices"), [(2, 1), (1, 3), (2, 2)])
def test_processes_meet_with_their_devices(processes, devices):
    code, lines, errors = finish(start(script=MEET, processes=processes, devices=devices))
    assert code == 0, errors
    total = processes * devices
    found = [line for line in lines if "devices" in line]
    assert found == [f"[{i}] devices {i} {devices} {total}" for i in range(processes)]


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("act", "code", "told"),
    [
        ("sys.exit(3)", 3, "process 1 ended with code 3; the others are stopped."),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            137,
            "process 1 was ended by SIGKILL; the others are stopped.",
        ),
    ],
)
def test_when_one_fails_the_others_are_stopped(act, code, told):
    found, lines, errors = finish(start(script=OTHERS_SLEEP.format(act), processes=3))
    assert found == code
    assert lines == ["[0] ready", "[1] ready", "[2] ready"]
    assert errors.splitlines() == [told]


@pytest.mark.slow
def test_those_that_do_not_heed_sigterm_are_stopped_too():
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + OTHERS_SLEEP
    code, _, errors = finish(start(script=script.format("time.sleep(1); sys.exit(3)")))
    assert code == 3
    assert "process 1 ended with code 3" in errors


@pytest.mark.first(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_once(number):
    script = """
import signal, sys, time
count = 0
def note(*_):
    global count
    count += 1
signal.signal(signal.{name}, note)
print("ready", flush=True)
while not count:
    time.sleep(0.01)
time.sleep(1)
print(count, "received", file=sys.stderr, flush=True)
"""
    process = start(script=script.format(name=number.name))
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    os.killpg(process.pid, number)  # as a terminal's Ctrl-C
    code, _, errors = finish(process)
    assert code == 0
    assert sorted(errors.splitlines()) == ["[0] 1 received", "[1] 1 received"]


def test_the_code_of_interrupted_processes_is_passed_on():
    script = "import time; print('ready', flush=True); time.sleep(100)"
    process = start(
        script=f"try:\n    {script}\nexcept KeyboardInterrupt:\n    raise SystemExit(130)"
    )
    for _ in range(2):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    code, _, errors = finish(process)
    assert code == 130
    assert re.match(r"process \d ended with code 130", errors)


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        (["--processes", "0", "--", "true"], "--processes: '0' must be a whole number"),
        (["--devices", "many", "--", "true"], "--devices: 'many' must be a whole number"),
        (["--processes", "2"], "COMMAND"),
        (["--", "no-such-program"], "no-such-program: No such file"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, right, capfd):
    with pytest.raises(SystemExit) as exit_code:
        local.main(arguments)
    assert exit_code.value.code == 2
    errors = capfd.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert right in errors


def test_a_file_of_xla_flags_is_refused(monkeypatch, capfd):
    monkeypatch.setenv("XLA_FLAGS", "flags.txt")
    with pytest.raises(SystemExit):
        local.main(["--", "true"])
    assert "XLA_FLAGS names a file, flags.txt" in capfd.readouterr().err


def test_a_single_process_is_told_of_no_others():
    assert local.membership("127.0.0.1:1", 1, 0) == []
    assert local.membership("127.0.0.1:1", 2, 1) == [
        *("--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=1")
    ]
