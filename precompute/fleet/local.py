"""Replicas as process groups on this box, each with a socket to its supervisor and a log of its own."""

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from precompute.fleet.devices import visible
from precompute.fleet.messages import FromWorker, ToWorker, from_worker, line
from precompute.fleet.replica import Replica, Slot

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONUNBUFFERED": "1"}
"""Torch reads the first when it is loaded; else every engine warns of how it binds memory."""
SEND_S = 30.0
"""A worker that does not read for so long is past talking to."""
VANISH_S = 10.0
"""Processes that were killed may take so long to be gone."""
CHUNK = 1 << 16
LAST_WORDS = 1 << 14
"""Bytes of a log that are read when its worker has died: room for a traceback or two."""
WORKER = "precompute.worker"
GUARD = "import os, signal, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), signal.SIGKILL)"
"""A process that ends a worker's group when its supervisor is gone, whatever killed it and however stuck the worker is.

vLLM's engine is a process of its own, which does not notice the death of those above it and would hold its GPU for
ever.
"""


class LocalReplica:
    """A worker process at the head of a group, so that killing the group ends its engine's processes as well."""

    lost = False
    """A supervisor that can ask is on the same machine."""

    def __init__(self, slot: Slot, log: Path, program: str = WORKER) -> None:
        self.slot, self.log = slot, log
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(SEND_S)
        self._ear = self._socket.dup()
        self._ear.setblocking(False)  # with a timeout, Python would wait for it whatever the flags say
        self._unread = b""
        with theirs, log.open("ab") as said:
            self._log_start = said.tell()  # before it stands what others on this slot have said
            self._process = subprocess.Popen(
                [sys.executable, "-m", program, str(theirs.fileno())],
                env={**QUIET, **os.environ, **visible(slot)},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        # It reads what nobody writes: only this process holds the other end. A session of its own outlives the
        # supervisor's group.
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", GUARD, str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def fileno(self) -> int:
        """Of the socket; it is readable when the worker has told something or has ended, also after `kill`."""
        return self._ear.fileno()

    def send(self, message: ToWorker) -> None:
        with suppress(OSError):  # it is gone, or past talking to: `ended` and the heartbeat will tell
            self._socket.sendall(line(message))

    def receive(self) -> list[FromWorker]:
        while True:
            try:
                data = self._ear.recv(CHUNK)
            except OSError:  # nothing more for now, or gone
                break
            if not data:
                break
            self._unread += data
        *whole, self._unread = self._unread.split(b"\n")
        return [from_worker(text) for text in whole]

    def ended(self) -> str | None:
        code = self._process.poll()
        if code is None:
            return None
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        self._guard.kill()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._guard.communicate()
        self._socket.close()
        deadline = time.monotonic() + VANISH_S
        with suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps it for ever: the others must go on
            self._process.wait(VANISH_S)
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self._process.pid, 0)
                with suppress(ChildProcessError):  # as a container's first process we inherit those below the worker
                    os.waitpid(-self._process.pid, os.WNOHANG)
                time.sleep(0.01)

    def last_words(self) -> str:
        with self.log.open("rb") as log:
            log.seek(max(self._log_start, self.log.stat().st_size - LAST_WORDS))
            return log.read().decode(errors="replace").strip()


class Box:
    """This machine as a place for replicas."""

    def __init__(self, slots: Sequence[Slot], logs: Path, program: str = WORKER) -> None:
        """
        Args:
            logs: folder for what the workers and their engines say.
            program: the module that is run as a worker, with the number of its socket as argument.
        """
        self._slots, self._logs, self._program = tuple(slots), logs, program
        logs.mkdir(parents=True, exist_ok=True)

    def slots(self) -> Sequence[Slot]:
        return self._slots

    def start(self, slot: Slot) -> LocalReplica:
        return LocalReplica(slot, self._logs / f"{os.getpid()}-{slot.name}.log", self._program)

    def tidy(self) -> None:
        """Remove the logs in which nothing stands."""
        for log in self._logs.glob(f"{os.getpid()}-*.log"):
            if not log.stat().st_size:
                log.unlink()

    def wait(self, replicas: Sequence[Replica], seconds: float) -> None:
        with selectors.DefaultSelector() as selector:
            for replica in replicas:
                if isinstance(replica, LocalReplica) and replica.ended() is None:
                    selector.register(replica, selectors.EVENT_READ)
            selector.select(seconds)
