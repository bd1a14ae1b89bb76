"""Tests of what happens to SIGINT while a run is between two of its steps."""

import signal
import threading

import pytest

from resflax import interruption


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
