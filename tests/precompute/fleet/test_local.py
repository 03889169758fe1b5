"""A worker's process group on this box: what is taken for its own words, and how it is heard of once it is killed."""

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from precompute.fleet.local import Box, LocalReplica
from precompute.fleet.replica import Slot

pytestmark = pytest.mark.slow

SLOT = Slot("0", ())
PR_SET_CHILD_SUBREAPER = 36
ENGINE = "import subprocess, time; subprocess.Popen(['sleep', '3600']); print('started'); time.sleep(3600)"
"""A worker with a process below it, as an engine's core is."""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], LocalReplica]:
    """Starts, on the same slot each time, a worker that runs the given lines."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(lines: str) -> LocalReplica:
        (tmp_path / "told_what_to_do.py").write_text(lines)
        return Box([SLOT], tmp_path / "logs", "told_what_to_do").start(SLOT)

    return run


def await_end(replica: LocalReplica) -> None:
    while replica.ended() is None:
        time.sleep(0.01)


def test_the_last_words_of_a_worker_are_its_own_and_not_those_of_the_one_before(
    start: Callable[[str], LocalReplica],
) -> None:
    first = start("raise MemoryError")
    await_end(first)
    first.kill()
    second = start("print('fine so far')")
    await_end(second)
    second.kill()
    assert "MemoryError" in first.last_words()
    assert second.last_words() == "fine so far"


def test_a_worker_that_was_killed_can_still_be_listened_for(start: Callable[[str], LocalReplica]) -> None:
    """Whoever waits for what a worker says may do so in another thread than the one that ends it."""
    replica = start("import time; time.sleep(3600)")
    replica.kill()
    assert replica.fileno() >= 0
    assert replica.receive() == [] and replica.ended() == "SIGKILL"


@pytest.mark.skipif(sys.platform != "linux", reason="who inherits orphans is told by a call of Linux")
def test_as_the_first_process_of_a_container_a_supervisor_clears_away_what_nobody_else_would(
    start: Callable[[str], LocalReplica],
) -> None:
    """The first process inherits all orphans, and those that nobody has waited for stay in their group for ever."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        replica = start(ENGINE)
        while "started" not in replica.last_words():
            time.sleep(0.01)
        replica.kill()
        assert [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE] == []
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0)
