"""CPU seconds and memory of a command and all processes below it, seen from outside: the same for every side.

Memory is the high-water mark of resident pages between two looks, so that no moment between them is missed; Linux
tells it and lets it start anew (man 5 proc). The clock is the one of `events`.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

RESET_PEAK = "5"
"""Written to /proc/PID/clear_refs: the high-water mark starts anew."""
LOOK_S = 0.2
ENGINE_NAME = "VLLM"
"""How vLLM calls the processes that it starts itself."""
SUPERVISOR, WORKER, ENGINE = "supervisor", "worker", "engine"
"""Who starts others and has no model; who asks the engine; what vLLM starts. On a CPU the engine is in the worker."""
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Look:
    """How things stood at one moment."""

    moment: float
    cpu_seconds: Mapping[str, float]
    """By role, since the command began; of processes that have ended, too."""
    peak_bytes: Mapping[str, int]
    """By role, the most since the look before."""


@dataclass(frozen=True)
class Looks:
    """All looks at one command, in their order."""

    looks: Sequence[Look]

    def cpu_seconds(self, roles: Sequence[str], since: float, until: float) -> float:
        """CPU seconds of `roles` between two moments."""
        return sum(self._cpu_at(role, until) - self._cpu_at(role, since) for role in roles)

    def peak_bytes(self, roles: Sequence[str], since: float) -> int:
        """The most that `roles` held together after the moment `since`."""
        return max((_held(look, roles) for look in self.looks if look.moment > since), default=0)

    def bytes_at(self, roles: Sequence[str], moment: float) -> int:
        """What `roles` held when the last look before `moment` was taken."""
        return next((_held(look, roles) for look in reversed(self.looks) if look.moment <= moment), 0)

    def _cpu_at(self, role: str, moment: float) -> float:
        """CPU seconds until `moment`, on the straight line between the looks before and after it."""
        before = next((look for look in reversed(self.looks) if look.moment <= moment), self.looks[0])
        after = next((look for look in self.looks if look.moment > moment), self.looks[-1])
        low, high = (look.cpu_seconds.get(role, 0.0) for look in (before, after))
        passed = after.moment - before.moment
        return low + (high - low) * min(1.0, (moment - before.moment) / passed) if passed > 0 else high


def _held(look: Look, roles: Sequence[str]) -> int:
    return sum(look.peak_bytes.get(role, 0) for role in roles)


@contextmanager
def watching(process: int, role: str) -> Iterator[Looks]:
    """Look at `process`, whose own part is `role`, and all below it, every so often until the body ends."""
    looks: list[Look] = []
    ended = Event()

    def keep_looking() -> None:
        known: dict[int, tuple[str, float]] = {}
        while not ended.is_set():
            looks.append(_look(process, role, known))
            ended.wait(LOOK_S)

    thread = Thread(target=keep_looking, name="watch")
    thread.start()
    try:
        yield Looks(looks)
    finally:
        ended.set()
        thread.join()


def _look(root: int, role: str, known: dict[int, tuple[str, float]]) -> Look:
    """One look; `known` keeps role and CPU seconds of every process ever seen."""
    peaks: dict[str, int] = {}
    for process in _family(root):
        try:
            name, seconds, peak = _measure(process)
        except OSError:  # it has ended meanwhile
            continue
        own = ENGINE if name.startswith(ENGINE_NAME) else role if process == root else WORKER
        if process in known or process == root:  # one just forked holds its parent's pages until its program begins
            peaks[own] = peaks.get(own, 0) + peak
        known[process] = (own, seconds)
    cpu: dict[str, float] = {}
    for own, seconds in known.values():
        cpu[own] = cpu.get(own, 0.0) + seconds
    return Look(time.monotonic(), cpu, peaks)


def _measure(process: int) -> tuple[str, float, int]:
    """Name, CPU seconds so far, and most bytes since the last call, of one process."""
    folder = Path(f"/proc/{process}")
    name, _, fields = (folder / "stat").read_text().partition("(")[2].rpartition(")")
    user, system = fields.split()[11:13]  # utime and stime, man 5 proc_pid_stat
    lines = (folder / "status").read_text().splitlines()
    peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
    if peak:  # else it has ended and waits to be noticed
        (folder / "clear_refs").write_text(RESET_PEAK)
    return name, (int(user) + int(system)) / TICKS, peak


def _family(root: int) -> Iterator[int]:
    """Ids of `root` and of all below it."""
    waiting = [root]
    while waiting:
        process = waiting.pop()
        yield process
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                waiting += map(int, children.read_text().split())
            except OSError:  # the thread has ended meanwhile
                continue
