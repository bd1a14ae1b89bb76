"""Tests of what happens to signals while a run is between two of its steps."""

import os
import pty
import signal
import threading
import time

import forked
import pytest

from resflax.checkpoint import store
from resflax.run import interruption


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_waits_and_the_second_does_not(number, code):
    before = signal.getsignal(number)
    with interruption.deferred() as asked:
        assert asked(0) is None
        signal.raise_signal(number)
        assert asked(1) == code
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) is before


# SIGHUP comes twice, or beside SIGTERM.
@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ((signal.SIGHUP, signal.SIGHUP), 129),
        ((signal.SIGHUP, signal.SIGTERM), 143),
        ((signal.SIGTERM, signal.SIGHUP), 143),
    ],
)
def test_a_hangup_is_no_second_signal(numbers, code):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
    with interruption.deferred() as asked:
        for number in numbers:
            signal.raise_signal(number)
        assert asked(1) == code
    signal.signal(signal.SIGHUP, before)


def test_a_hangup_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption.deferred() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert asked(1) is None
    finally:
        signal.signal(signal.SIGHUP, before)


PLAIN = ("--config", "tests/plain.py", "--config.train.epochs=10000", "--workdir")

# A save that takes longer than a test waits.
SLOW = """
import runpy, sys, time
from resflax.checkpoint import Checkpointer
sys.argv = {!r}
def close(self):
    print("saving", flush=True)
    time.sleep(1000)
Checkpointer.close = close
runpy.run_module("resflax.main", run_name="__main__", alter_sys=True)
"""


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_a_run_that_still_saves(tmp_path, number, code):
    process = forked.Process("-c", SLOW.format(["resflax.main", *PLAIN, str(tmp_path / "run")]))
    process.wait_for(tmp_path / "run/metrics.jsonl")
    process.send(number)
    deadline = time.monotonic() + 200
    while "saving" not in process.output:
        assert time.monotonic() < deadline, process.output
        time.sleep(0.05)
    process.send(number)
    result = process.finish(10)
    assert result.code == code
    assert result.errors == "stopped at once; the same command goes on from the last checkpoint.\n"


# The process leads a session of its own, whose terminal is this one.
IN_A_TERMINAL = """
import os, runpy, sys
os.setsid()
terminal = os.open({!r}, os.O_RDWR)
for number in range(3):
    os.dup2(terminal, number)
sys.argv = {!r}
runpy.run_module("resflax.main", run_name="__main__", alter_sys=True)
"""


@pytest.mark.long
def test_a_run_whose_terminal_is_closed_saves_its_state(tmp_path):
    ours, theirs = pty.openpty()
    arguments = ["resflax.main", *PLAIN, str(tmp_path / "run")]
    process = forked.Process("-c", IN_A_TERMINAL.format(os.ttyname(theirs), arguments))
    process.wait_for(tmp_path / "run/metrics.jsonl")
    os.close(theirs)
    before = store.steps(tmp_path / "run")
    os.close(ours)
    assert process.finish(60).code == 129
    assert max(store.steps(tmp_path / "run")) > max(before, default=0)


def test_another_thread_leaves_signals_alone():
    handlers = []

    def run():
        with interruption.deferred() as asked:
            asked(0)
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
