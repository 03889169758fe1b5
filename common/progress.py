"""Progress of a long job: a live bar on a terminal, a plain line now and then elsewhere; always on stderr."""

import sys
import time
from types import TracebackType
from typing import TextIO

LINE_EVERY_S = 10.0
BAR_EVERY_S = 0.2
BAR_WIDTH = 24


class Progress:
    """Counts `done` of `total` steps and the work units in them, and says speed and time left.

    Args:
        label: what is going on.
        total: steps in all, those already done included.
        unit: what the rate counts (`tok`).
        done: steps that an earlier run did; they do not count into the rate.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0, stream: TextIO | None = None) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._stream = stream or sys.stderr
        self._first, self._work = done, 0.0
        self._started = self._shown = time.monotonic()
        self._live = self._stream.isatty()

    def __enter__(self) -> "Progress":
        self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show(last=True)

    def advance(self, steps: int, work: float) -> None:
        """`steps` more are done, holding `work` units."""
        self.done += steps
        self._work += work
        if time.monotonic() - self._shown >= (BAR_EVERY_S if self._live else LINE_EVERY_S):
            self._show()

    @property
    def rate(self) -> float:
        """Work units a second in this run."""
        return self._work / max(time.monotonic() - self._started, 1e-9)

    def _show(self, last: bool = False) -> None:
        self._shown = time.monotonic()
        share = self.done / self.total if self.total else 1.0
        text = (
            f"{self.label}: {self.done}/{self.total} ({share:.0%}), {self.rate:,.0f} {self.unit}/s, {self._left(last)}"
        )
        if self._live:
            filled = round(share * BAR_WIDTH)
            self._stream.write(f"\r\x1b[K{'━' * filled}{'╌' * (BAR_WIDTH - filled)} {text}" + ("\n" if last else ""))
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def _left(self, last: bool) -> str:
        elapsed = time.monotonic() - self._started
        if last:
            return f"took {duration(elapsed)}"
        if self.done == self._first:
            return "time left unknown"
        return f"{duration(elapsed / (self.done - self._first) * (self.total - self.done))} left"


def duration(seconds: float) -> str:
    """75 -> '1m15s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
