"""A box that runs `lopd precompute run`, and what befalls its command, its workers and their engines' processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from uuid import uuid4

import psutil

MARK = "CHAOS_BOX"
"""Environment variable that every process of one start of a box has, and no other process."""
MODULES = {"puppet": "tests.precompute.fleet.command", "vllm": "common.cli"}
CORES = {"puppet": "sleep", "vllm": "EngineCor"}
"""In the names of engines' own processes."""
STOPPED = 128 + signal.SIGTERM
RETRY_LATER = 75


class Blow(StrEnum):
    """What befalls a box."""

    CORE = "engine core: SIGKILL"
    WORKER = "worker: SIGKILL"
    COMMAND = "command: SIGKILL"
    TERM = "command: SIGTERM"
    STOP = "worker: SIGSTOP, for ever"


class Box:
    """One start of the command on one box."""

    def __init__(self, engine: str, words: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log, self.mark = log, uuid4().hex
        self.blow: Blow | None = None
        """The last one that the command itself was struck by."""
        self._core = CORES[engine]
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULES[engine], "precompute", "run", *words],
                env={**os.environ, **environment, MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )

    def ended(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def how(self) -> str:
        """How it ended, in words; `wrong: ...` for what must not happen."""
        code, said = self._process.returncode, self.log.read_text(errors="replace")
        if "Traceback" in said:
            return "wrong: a traceback"
        if code == 0:
            return "finished"
        if (code, self.blow) == (-signal.SIGKILL, Blow.COMMAND):
            return "killed"
        if self.blow == Blow.TERM and code in (STOPPED, -signal.SIGTERM):
            return "drained" if code == STOPPED else "stopped before or after its work"
        if code == RETRY_LATER and "engines died one after another" in said:
            return "gave up after deaths, to be resumed (75)"
        return f"wrong: exit code {code}"

    def strike(self, blow: Blow, chance: float) -> bool:
        """Whether there was anything to strike. `chance`, in [0, 1), chooses among the victims."""
        victims = list(self._victims(blow))
        if not victims:
            return False
        victim = victims[int(chance * len(victims))]
        number = {Blow.TERM: signal.SIGTERM, Blow.STOP: signal.SIGSTOP}.get(blow, signal.SIGKILL)
        with suppress(psutil.NoSuchProcess):
            victim.send_signal(number)
            if blow in (Blow.COMMAND, Blow.TERM):
                self.blow = blow
            return True
        return False

    def end(self) -> None:
        """Kill all that is left of it."""
        for process in self.left():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def left(self) -> list[psutil.Process]:
        """All living processes that descend from this start, orphans included."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def _victims(self, blow: Blow) -> Iterator[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            command = psutil.Process(self._process.pid)
            if blow in (Blow.COMMAND, Blow.TERM):
                yield command
                return
            for worker in command.children():
                if "-c" in worker.cmdline():  # not the guard beside it
                    continue
                if blow != Blow.CORE:
                    yield worker
                else:
                    yield from (below for below in worker.children(recursive=True) if self._core in below.name())
