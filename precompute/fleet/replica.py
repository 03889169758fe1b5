"""One engine at work, as its supervisor sees it, wherever it runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from precompute.fleet.messages import FromWorker, ToWorker


@dataclass(frozen=True)
class Slot:
    """Where one replica runs: its name, and the devices that are its own."""

    name: str
    devices: tuple[int, ...]
    """Indices of GPUs; none on a CPU."""


class Replica(Protocol):
    """A worker process group. It ends by itself, or is killed; it is never started again: a new one takes its place."""

    slot: Slot
    lost: bool
    """Whether it is gone with its machine, which says nothing of the rows that were in its engine."""

    def send(self, message: ToWorker) -> None:
        """Tell it something; nothing happens when it is gone."""
        ...

    def receive(self) -> list[FromWorker]:
        """What it has told since the last call, without waiting."""
        ...

    def ended(self) -> str | None:
        """How it ended (`exit code 3`, `SIGKILL`, `its node is gone`); None while it lives."""
        ...

    def last_words(self) -> str:
        """The end of what it and its engine wrote, some lines of it."""
        ...

    def kill(self) -> None:
        """End it and all of its processes at once, and return when its devices are free."""
        ...


class Launcher(Protocol):
    """Where replicas run."""

    def slots(self) -> Sequence[Slot]:
        """Where a replica can run now; with Ray it changes as nodes come and go."""
        ...

    def start(self, slot: Slot) -> Replica: ...

    def wait(self, replicas: Sequence[Replica], seconds: float) -> None:
        """Return when one of them has something to tell or has ended, or after so long."""
        ...
