"""Tests of how a launcher takes signals and ends processes, with real ones."""

import contextlib
import signal
import subprocess
import time

import pytest

from launch import signals

TAKEN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(signals, "POLL", 0.01)


@pytest.fixture(autouse=True)
def _hangup():
    """The tests may run under nohup, which has it ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@contextlib.contextmanager
def sleeping(*ignored):
    """A process that sleeps, and ignores some signals."""
    trap = f"trap '' {' '.join(map(str, ignored))};" if ignored else ""
    command = ["sh", "-c", f"{trap} echo ready; exec sleep 100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def handlers():
    return [signal.getsignal(number) for number in TAKEN]


def test_signals_are_noted_in_order_and_do_nothing_else():
    before = handlers()
    with signals.noted() as received:
        assert received == []
        assert all(now != old for now, old in zip(handlers(), before, strict=True))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGINT):
            signal.raise_signal(number)
        assert received == [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGINT]
    assert handlers() == before


def test_a_failure_gives_the_signals_back():
    before = handlers()
    with pytest.raises(KeyError, match="lost"), signals.noted():
        raise KeyError("lost")
    assert handlers() == before


def test_under_nohup_a_hangup_is_still_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.noted() as received:
            signal.raise_signal(signal.SIGHUP)
            assert received == []
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_that_heeds_the_first_signal_gets_no_other():
    with sleeping() as one, sleeping() as another:
        signals.end([one, another], [(signal.SIGTERM, 60.0), (signal.SIGUSR1, 60.0)], [])
        assert [one.returncode, another.returncode] == [-signal.SIGTERM] * 2


def test_a_process_that_does_not_heed_a_signal_gets_the_next_after_its_time():
    with sleeping(signal.SIGUSR1) as process:
        start = time.monotonic()
        signals.end([process], [(signal.SIGUSR1, 0.2), (signal.SIGTERM, 60.0)], [])
        assert process.returncode == -signal.SIGTERM
        assert time.monotonic() - start >= 0.2


def test_a_process_that_heeds_nothing_is_killed_while_the_others_are_waited_for():
    with sleeping(signal.SIGUSR1, signal.SIGTERM) as deaf, sleeping() as other:
        signals.end([deaf, other], [(signal.SIGUSR1, 0.05), (signal.SIGTERM, 0.05)], [])
        assert [deaf.returncode, other.returncode] == [-signal.SIGKILL, -signal.SIGUSR1]


def test_another_signal_goes_to_the_next_stage_at_once():
    received = [signal.SIGUSR1]  # the one that this end is for
    looks = 0

    def meanwhile():
        nonlocal looks
        looks += 1
        if looks == 3:
            received.append(signal.SIGUSR1)

    with sleeping(signal.SIGUSR1) as process:
        start = time.monotonic()
        stages = [(signal.SIGUSR1, 60.0), (signal.SIGTERM, 60.0)]
        signals.end([process], stages, received, meanwhile)
        assert time.monotonic() - start < 30
        assert process.returncode == -signal.SIGTERM
        assert looks >= 3


def test_processes_that_have_ended_are_left_alone():
    with sleeping() as ended, sleeping() as other:
        ended.kill()
        ended.wait()
        signals.end([ended, other], [(signal.SIGTERM, 60.0)], [])
        assert [ended.returncode, other.returncode] == [-signal.SIGKILL, -signal.SIGTERM]
    signals.end([], [(signal.SIGTERM, 60.0)], [], lambda: pytest.fail("nothing is waited for"))


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("exit 0", "ended with code 0"),
        ("exit 2", "ended with code 2"),
        ("kill -9 $$", "was ended by SIGKILL"),
        ("kill -40 $$", "was ended by signal 40"),  # one of the real-time signals, without a name
    ],
)
def test_how_a_process_ended_is_told(script, told):
    code = subprocess.run(["sh", "-c", script], check=False).returncode
    assert signals.ending(code) == told
