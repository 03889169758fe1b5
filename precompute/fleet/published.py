"""The status of this box for others: in the store of the dataset, and in a local file if one is asked for."""

import threading
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from types import TracebackType

from common.canonical import canonical
from common.errors import LopdError
from common.local_files import write_whole
from common.status_files import status_key
from common.storage import Store
from precompute.fleet.status import Status

EVERY_S = 30.0
"""Between two writings; a change of the phase's state is written at once."""
LAST_WORD_S = 10.0
"""How long the end of a job waits for the last writing."""


class Published:
    """Writes each new status, from threads of its own: a place that is slow or fails holds up nobody.

    A place that fails is told of once, and again only when it has been well in between.

    Args:
        url: of the dataset; its store then holds `status/<box>.json`. None writes nothing there.
        file: on this machine, replaced whole each time.
        tell: is told in a line what fails, from a thread.
    """

    def __init__(self, url: str | None, file: Path | None, tell: Callable[[str], None]) -> None:
        self._places: list[_Place] = []
        if url is not None:
            store = Store(url)
            self._places.append(
                _Place(store.url, lambda status: store.put(status_key(status.box), as_bytes(status)), tell)
            )
        if file is not None:
            self._places.append(_Place(str(file), lambda status: write_whole(file, BytesIO(as_bytes(status))), tell))

    def __enter__(self) -> "Published":
        for place in self._places:
            place.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the last status; a place that does not take it within `LAST_WORD_S` seconds goes without."""
        for place in self._places:
            place.end()
        _join(self._places, LAST_WORD_S)

    def offer(self, status: Status) -> None:
        """How it stands now; returns at once, and may be called as often as one likes."""
        for place in self._places:
            place.offer(status)


def as_bytes(status: Status) -> bytes:
    """The status as it is written: one JSON object."""
    return canonical(status.model_dump(mode="json"))


class _Place(threading.Thread):
    """One place, and the thread that writes there; a daemon, for a store that hangs must not keep a job from ending."""

    def __init__(self, name: str, write: Callable[[Status], None], tell: Callable[[str], None]) -> None:
        super().__init__(name="status", daemon=True)
        self._where, self._write, self._tell = name, write, tell
        self._news = threading.Condition()
        self._latest: Status | None = None
        self._written: Status | None = None
        self._tried_at = -EVERY_S
        self._ended = self._failing = False

    def offer(self, status: Status) -> None:
        with self._news:
            self._latest = status
            self._news.notify()

    def end(self) -> None:
        with self._news:
            self._ended = True
            self._news.notify()

    def run(self) -> None:
        ended = False
        while not ended:
            with self._news:
                while not self._is_due():
                    self._news.wait(self._pause() if self._has_news() else None)
                status, ended = (self._latest if self._has_news() else None), self._ended
            if status is not None:
                self._try(status)

    def _has_news(self) -> bool:
        return self._latest is not self._written

    def _is_due(self) -> bool:
        if self._ended or self._latest is None or not self._has_news():
            return self._ended
        changed = self._written is None or self._written.state != self._latest.state
        return (changed and not self._failing) or self._pause() <= 0

    def _pause(self) -> float:
        return max(0.0, self._tried_at + EVERY_S - time.monotonic())

    def _try(self, status: Status) -> None:
        try:
            self._write(status)
        except (LopdError, OSError) as error:
            if not self._failing:
                why = error.what if isinstance(error, LopdError) else str(error)
                self._tell(f"the status is not written to {self._where}, which harms nothing else: {why}")
            self._failing = True
        else:
            self._written, self._failing = status, False
        self._tried_at = time.monotonic()


def _join(places: Sequence[_Place], seconds: float) -> None:
    """Wait for all of them together for so long at most."""
    until = time.monotonic() + seconds
    for place in places:
        place.join(max(0.0, until - time.monotonic()))
