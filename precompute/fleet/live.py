"""What a person sees of a phase while it runs: a picture on a terminal, plain lines elsewhere; always on stderr."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from common.terminal import rich_console
from common.untrusted import one_line
from precompute.fleet.frame import frame
from precompute.fleet.lines import ENDED, LABELS, changes, line_of
from precompute.fleet.status import Phase, Status

LINE_EVERY_S = 10.0
REFRESHES_PER_S = 4


class View:
    """Shows one phase from its start to its end.

    A thread of rich's redraws the picture, so that it shows life while the supervisor does something else.

    Args:
        phase: which, for its name is shown before there is a status.
        clock: seconds, monotonic.
    """

    def __init__(self, phase: Phase, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._stream, self._clock = LABELS[phase], stream or sys.stderr, clock
        self._status: Status | None = None
        self._taken = self._told = clock()
        self._since: dict[str, tuple[str, float]] = {}
        self._spinner = Spinner("dots")
        console = rich_console(self._stream)
        self._live = self._make_live(console) if console is not None else None

    def __enter__(self) -> "View":
        if self._live is not None:
            self._live.start()
        else:
            self._write("starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, status: Status) -> None:
        """How it stands now; may be called as often as one likes."""
        before, self._status, self._taken = self._status, status, self._clock()
        self._since = {
            replica.name: (replica.state, self._taken)
            if self._since.get(replica.name, ("", 0.0))[0] != replica.state
            else self._since[replica.name]
            for replica in status.replicas
        }
        if self._live is not None:
            return
        for change in changes(before, status):
            self._write(change)
        if before is None or before.state != status.state or self._taken - self._told >= LINE_EVERY_S:
            self._told = self._taken
            self._write(line_of(status, self._seconds()))

    def say(self, line: str, style: str = "") -> None:
        """A line in between; from any thread. `style` is one of rich's, for a terminal."""
        if self._live is None:
            self._write(one_line(line))
        else:
            self._live.console.print(Text(f"{self._label}: {one_line(line)}", style), soft_wrap=True)

    def _write(self, line: str) -> None:
        self._stream.write(f"{self._label}: {line}\n")
        self._stream.flush()

    def _seconds(self) -> dict[str, float]:
        """How long each replica has been in its state."""
        now = self._clock()
        return {name: now - since for name, (_, since) in self._since.items()}

    def _make_live(self, console: Console) -> Live:
        return Live(
            console=console,
            get_renderable=lambda: self._picture(console),
            refresh_per_second=REFRESHES_PER_S,
            redirect_stdout=False,  # stdout may be a pipe: what is printed there must not land on this terminal
        )

    def _picture(self, console: Console) -> RenderableType:
        spinner = str(self._spinner.render(console.get_time()))
        if self._status is None:
            return Text(f"{spinner} {self._label}: starting")
        status = self._status
        if status.state not in ENDED:
            status = status.model_copy(update={"seconds": status.seconds + self._clock() - self._taken})
        return frame(status, self._seconds(), spinner, console.width, console.height)
