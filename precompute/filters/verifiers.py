"""Who says whether a completion is right: `math-verify` or a user's function, never in this process.

A verifier may hang, crash or raise. Each stands in a process of its own and has so many seconds for each completion;
what it fails on gets no verdict, and the failure is told.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

from common.errors import DataError, UsageError

STARTUP_S = 120.0
"""For which a verifier may load."""
FIX = "Give filters.verifier as math-verify, package.module:function or file.py:function"


@dataclass(frozen=True)
class Failure:
    """No verdict, and why."""

    reason: str


class NoAnswer(Exception):
    """The process hung or died."""


class VerifierProcess:
    """One process. Not safe to use from two threads at once.

    Args:
        log: the file to which goes what it prints; None for our own stderr.
    """

    def __init__(self, name: str, key: str | None, timeout_s: float, log: Path | None = None) -> None:
        self.name, self._key, self._timeout_s, self._log = name, key, timeout_s, log
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""

    def start(self) -> str:
        """Start it, unless it runs; returns what pins the verifier, a hash or a version.

        Raises:
            UsageError: it cannot be loaded, or does not load in two minutes.
        """
        command = [sys.executable, "-m", "precompute.filters.verifier_process", self.name]
        with self._log.open("ab") if self._log else nullcontext() as log:
            self._process = subprocess.Popen(
                [*command, self._key] if self._key else command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._read = b""
        try:
            said = self._answer(time.monotonic() + STARTUP_S)
        except NoAnswer as error:
            raise UsageError(f"the verifier does not start: {error}", where=self.name, fix=FIX) from None
        if "error" in said:
            self.close()
            raise UsageError(f"the verifier cannot be loaded: {said['error']}", where=self.name, fix=FIX)
        return said["pin"]

    def verdict(self, text: str, meta: str) -> bool | Failure:
        """Whether the completion is right.

        Args:
            meta: what the prompt brought along, as JSON.
        """
        if self._process is None:
            self.start()
        line = json.dumps({"text": text, "meta": json.loads(meta)}) + "\n"
        deadline = time.monotonic() + self._timeout_s
        try:
            self._send(line.encode(), deadline)
            said = self._answer(deadline)
        except NoAnswer as error:
            return Failure(str(error))
        return Failure(said["error"]) if "error" in said else said["verdict"]

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _send(self, data: bytes, deadline: float) -> None:
        process = self._running()
        assert process.stdin is not None, "it is a pipe"
        left = memoryview(data)
        while left:
            self._wait(process.stdin.fileno(), select.POLLOUT, deadline)
            try:
                left = left[os.write(process.stdin.fileno(), left[: select.PIPE_BUF]) :]
            except BrokenPipeError:
                raise self._dead() from None

    def _answer(self, deadline: float) -> dict[str, Any]:
        process = self._running()
        assert process.stdout is not None, "it is a pipe"
        while b"\n" not in self._read:
            self._wait(process.stdout.fileno(), select.POLLIN, deadline)
            more = os.read(process.stdout.fileno(), 1 << 16)
            if not more:
                raise self._dead()
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        ready = select.poll()
        ready.register(descriptor, event)
        if not ready.poll(max(deadline - time.monotonic(), 0) * 1000):
            self.close()
            raise NoAnswer(f"it gave no verdict within {self._timeout_s:g} s")

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "it was started"
        return self._process

    def _dead(self) -> NoAnswer:
        process = self._running()
        process.kill()
        process.communicate()
        self._process = None
        return NoAnswer(f"its process ended with exit code {process.returncode}")


class Verifier:
    """Several such processes, which start when they are needed.

    Args:
        pin: what `pin_of` said when the plan was made; a verifier of another source is refused.
        log: the file to which goes what they print, and which is removed at the end where that is nothing. A worker's
            own log is searched for what an engine died of, and a verifier that runs out of memory must not be that.
    """

    def __init__(self, name: str, key: str | None, timeout_s: float, processes: int, pin: str, log: Path) -> None:
        self._name, self._pin, self._log = name, pin, log
        self.judged = 0
        """Completions judged so far, those without a verdict too."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._all = [VerifierProcess(name, key, timeout_s, log) for _ in range(processes)]
        self._free: SimpleQueue[VerifierProcess] = SimpleQueue()
        for process in self._all:
            self._free.put(process)
        self._threads: ThreadPoolExecutor | None = None
        self._starting, self._counting = Lock(), Lock()

    def judge(self, completions: Sequence[tuple[str, str]]) -> list[bool | Failure]:
        """A verdict for each pair of a text and its `meta` as JSON.

        Raises:
            UsageError: the verifier cannot be loaded on this box.
            DataError: its source is not the one in the plan.
        """
        with self._starting:
            if self._threads is None:
                self._require_pin()
                self._threads = ThreadPoolExecutor(len(self._all), thread_name_prefix="verifier")
        return list(self._threads.map(self._verdict, completions))

    def close(self) -> None:
        """End all processes."""
        if self._threads is not None:
            self._threads.shutdown()
        for process in self._all:
            process.close()
        if self._log.exists() and not self._log.stat().st_size:
            self._log.unlink()

    def _verdict(self, completion: tuple[str, str]) -> bool | Failure:
        process = self._free.get()
        try:
            return process.verdict(*completion)
        finally:
            with self._counting:
                self.judged += 1
            self._free.put(process)

    def _require_pin(self) -> None:
        found = self._all[0].start()
        if found != self._pin:
            raise DataError(
                f"the verifier is not the one of the plan: {found}, the plan says {self._pin}",
                where=self._name,
                fix="Bring the same file, or the same version, to every box",
            )


def pin_of(name: str, key: str | None) -> str:
    """What a plan says of a verifier beside its name: the sha256 of its source file, or the package's version.

    Raises:
        UsageError: it cannot be loaded.
    """
    process = VerifierProcess(name, key, STARTUP_S)
    try:
        return process.start()
    finally:
        process.close()
