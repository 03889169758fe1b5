"""Progress of a long job: a live bar on a terminal, a plain line now and then elsewhere; always on stderr."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO, TypeVar

import rich.progress
from rich.console import Console
from rich.text import Text

from common.terminal import rich_console

Item = TypeVar("Item")
LINE_EVERY_S = 10.0
BAR_WIDTH = 14
"""Leaves room for the numbers on a terminal of 80 columns."""
PATIENCE_S = 2.0
"""How long a step may last before it is said that it runs."""
BYTES = "B"
"""The unit of bytes, which are shown as kB, MB, GB."""


class Progress:
    """Counts `done` of `total` steps and the work units in them, and says speed and time left.

    Args:
        label: what is going on.
        total: steps in all, those already done included.
        unit: what the rate counts (`tok`); with `BYTES` the steps are bytes too.
        done: steps that an earlier run did; they do not count into the rate.
        brief: the job is mostly over at once; then nothing of it stays on a terminal, and elsewhere nothing is said
            unless it lasts.
    """

    def __init__(
        self, label: str, total: int, unit: str, done: int = 0, stream: TextIO | None = None, *, brief: bool = False
    ) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._stream = stream or sys.stderr
        self._first, self._work, self._ended = done, 0.0, False
        self._started = self._shown = time.monotonic()
        console = rich_console(self._stream)
        self._bar = _bar(self, console, brief) if console is not None else None
        self._silence = threading.Timer(PATIENCE_S, self._write_line) if brief else None

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        elif self._silence is not None:
            self._silence.daemon = True
            self._silence.start()
        else:
            self._write_line()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        if self._bar is not None:
            self._bar.stop()
        elif self._silence is None or self._silence.finished.is_set():
            self._write_line()
        else:
            self._silence.cancel()

    def advance(self, steps: int, work: float) -> None:
        """`steps` more are done, holding `work` units."""
        self.done += steps
        self._work += work
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.share)
        elif time.monotonic() - self._shown >= LINE_EVERY_S:
            self._write_line()

    @property
    def rate(self) -> float:
        """Work units a second in this run."""
        return self._work / max(time.monotonic() - self._started, 1e-9)

    @property
    def share(self) -> float:
        """How much is done, 0 to 1; nothing to do is done."""
        return self.done / self.total if self.total else 1.0

    def __str__(self) -> str:
        if self.unit == BYTES:
            return f"{size(self.done)}/{size(self.total)} ({self.share:.0%}), {size(self.rate)}/s, {self._left()}"
        return f"{self.done}/{self.total} ({self.share:.0%}), {self.rate:,.0f} {self.unit}/s, {self._left()}"

    def _write_line(self) -> None:
        self._shown = time.monotonic()
        self._stream.write(f"{self.label}: {self}\n")
        self._stream.flush()

    def _left(self) -> str:
        elapsed = time.monotonic() - self._started
        if self._ended:
            return f"took {duration(elapsed)}"
        if self.done == self._first:
            return "time left unknown"
        return f"{duration(elapsed / (self.done - self._first) * (self.total - self.done))} left"


def _bar(progress: Progress, console: Console, transient: bool) -> rich.progress.Progress:
    """The bar, redrawn several times a second by a thread of rich's, so that it shows life between two steps."""
    bar = rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(bar_width=BAR_WIDTH),
        _Numbers(progress),
        console=console,
        transient=transient,
        redirect_stdout=False,  # stdout may be a pipe: what is printed there must not land on this terminal
    )
    bar.update(bar.add_task(progress.label, total=1.0), completed=progress.share)
    return bar


class _Numbers(rich.progress.ProgressColumn):
    """Counts, speed and time left as text."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: rich.progress.Task) -> Text:
        return Text(str(self._progress), no_wrap=True)


def followed(items: Iterable[Item], label: str, total: int, unit: str) -> Iterator[Item]:
    """`items`, `total` of them, as they are; shows how far they are if it lasts."""
    with Progress(label, total, unit, brief=True) as progress:
        for item in items:
            yield item
            progress.advance(1, 1)


@contextmanager
def waiting(label: str, stream: TextIO | None = None) -> Iterator[None]:
    """One step of unknown length, such as a listing: a spinner on a terminal, elsewhere a line if it takes long."""
    target = stream or sys.stderr
    console = rich_console(target)
    if console is not None:
        with console.status(Text(label)):
            yield
        return
    timer = threading.Timer(PATIENCE_S, lambda: target.write(f"{label}...\n"))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def duration(seconds: float) -> str:
    """75 -> '1m15s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def size(count: float) -> str:
    """1234567 -> '1.2 MB'; decimal units."""
    if count < 1000:
        return f"{round(count)} B"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.95 or unit == "TB":
            return f"{count:.1f} {unit}"
    raise AssertionError("unreachable: terabytes have no upper bound")
