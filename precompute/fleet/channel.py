"""A worker's end of the socket to its supervisor."""

import os
import queue
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import NoReturn

from precompute.fleet.messages import Drain, FromWorker, Job, Nothing, Want, Work, line, to_worker


class Channel:
    """Tells from any thread; hears in one of its own. Without a supervisor there is nothing to live for."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._telling = connection, threading.Lock()
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Work | Nothing] = queue.SimpleQueue()
        self._deadline: float | None = None
        threading.Thread(target=self._listen, name="supervisor", daemon=True).start()

    def job(self) -> Job:
        """What to do, told once."""
        return self._jobs.get()

    def tell(self, message: FromWorker) -> None:
        """Send it on; the order within a thread is kept."""
        with self._telling:
            try:
                self._socket.sendall(line(message))
            except OSError:
                end_group()

    def ask(self, want: Want) -> Work | None:
        """A shard to do; None when there is none for now, or, for one that is idle, none any more."""
        self.tell(want)
        answer = self._answers.get()
        return answer if isinstance(answer, Work) else None

    @property
    def draining(self) -> bool:
        """Whether no shard is to be begun any more, be it fetched already."""
        return self._deadline is not None

    def overdue(self) -> bool:
        """Whether the time to finish what is in flight is over."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def _listen(self) -> None:
        # A supervisor that was killed resets the connection if it had not read all that it was told.
        with suppress(ConnectionResetError), self._socket.makefile("rb") as lines:
            for text in lines:
                message = to_worker(text)
                if isinstance(message, Drain):
                    self._deadline = time.monotonic() + message.seconds
                elif isinstance(message, Job):
                    self._jobs.put(message)
                else:
                    self._answers.put(message)
        end_group()


def end_group() -> NoReturn:
    """End this process and those of its engine, which would hold the GPU."""
    os.killpg(os.getpgrp(), signal.SIGKILL)
    raise AssertionError("unreachable: a process does not outlive its own SIGKILL")
