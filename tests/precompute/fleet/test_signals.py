"""What a job makes of the signals that end it."""

import signal

from precompute.fleet.member import LEAVE_S
from precompute.fleet.signals import ONE_SIGNAL_S, Signals
from tests.precompute.fleet.test_member import Clock

GRACE_S = 90.0


def test_the_first_begins_a_grace_once_and_a_second_ends_it() -> None:
    clock = Clock()
    signals = Signals(GRACE_S, clock)
    with signals.heeded():
        assert not signals and not signals.begin_grace()
        signal.raise_signal(signal.SIGTERM)
        assert signals and signals.begin_grace() and not signals.begin_grace()
        assert signals.name == "SIGTERM" and not signals.ends_now
        clock.now += ONE_SIGNAL_S
        signal.raise_signal(signal.SIGINT)
        assert signals.ends_now and signals.name == "SIGTERM"


def test_one_signal_that_comes_several_times_at_once_is_one() -> None:
    clock = Clock()
    signals = Signals(GRACE_S, clock)
    with signals.heeded():
        for _ in range(5):
            signal.raise_signal(signal.SIGINT)
            clock.now += ONE_SIGNAL_S / 2
        assert signals and not signals.ends_now


def test_a_grace_that_is_over_ends_it_as_well() -> None:
    clock = Clock()
    signals = Signals(GRACE_S, clock)
    with signals.heeded():
        signal.raise_signal(signal.SIGTERM)
        assert signals.begin_grace()
        clock.now += GRACE_S + LEAVE_S
        assert not signals.ends_now
        clock.now += 1
        assert signals.ends_now


def test_a_job_that_was_stopped_says_by_what_and_that_it_can_be_resumed() -> None:
    signals = Signals(GRACE_S)
    with signals.heeded():
        signal.raise_signal(signal.SIGTERM)
    error = signals.stopped(3, 20)
    assert error.exit_code == 143
    assert str(error) == "stopped by SIGTERM; 3 of 20 shards are committed. The same command resumes"


def test_afterwards_signals_are_what_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Signals(GRACE_S).heeded():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
