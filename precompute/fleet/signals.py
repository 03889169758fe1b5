"""The signals that end a job: the first drains, the second ends at once, and so does a grace that is over.

The handler only notes them, for it may come between any two instructions; the supervisor's loop asks what was noted.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from common.errors import RetryLater
from precompute.fleet.member import LEAVE_S

ONE_SIGNAL_S = 0.5
"""Launchers that signal a whole tree of processes, of which some pass it on, mean one signal by several."""


class Stopped(RetryLater):
    """A signal ended the job."""

    def __init__(self, number: int, done: int, total: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name}; {done} of {total} shards are committed",
            fix="The same command resumes",
        )
        self.exit_code = 128 + number


class Signals:
    """SIGTERM and SIGINT, noted while `heeded`.

    Args:
        grace_s: for which shards in flight may go on after the first.
        clock: seconds, monotonic.
    """

    def __init__(self, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.grace_s, self._clock = grace_s, clock
        self._noted: list[int] = []  # appended to by a signal handler, where nothing that takes a lock may be used
        self._last = clock() - ONE_SIGNAL_S
        self._deadline: float | None = None

    def __bool__(self) -> bool:
        """Whether the job is to end."""
        return bool(self._noted)

    @property
    def name(self) -> str:
        """Of the first."""
        return signal.Signals(self._noted[0]).name

    @property
    def ends_now(self) -> bool:
        """Whether what still runs is to be killed: a second one came, or the grace and the time to leave are over."""
        over = self._deadline is not None and self._clock() > self._deadline
        return len(self._noted) > 1 or over

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Within, they are noted; only in the main thread."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def begin_grace(self) -> bool:
        """Whether the first has come since the last call; its grace begins now."""
        if not self._noted or self._deadline is not None:
            return False
        self._deadline = self._clock() + self.grace_s + LEAVE_S
        return True

    def stopped(self, done: int, total: int) -> Stopped:
        """The end of a job of which so many shards are committed."""
        return Stopped(self._noted[0], done, total)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = self._clock()
        if now - self._last >= ONE_SIGNAL_S:
            self._noted.append(number)
        self._last = now
