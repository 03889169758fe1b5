"""A replica on a node of a Ray cluster, as its supervisor sees it."""

import signal
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from precompute.fleet.messages import FromWorker, ToWorker, from_worker, line
from precompute.fleet.ray_relay import Heard
from precompute.fleet.replica import Slot

THREADS = {"tell": 1, "hear": 1, "end": 1}
"""Of a relay: each takes its calls one after another."""
HEAR_S = 10.0
"""One call to a relay waits so long for something to tell."""
KILL_S = 15.0
"""A relay that does not answer for so long is past ending its worker."""


class RayReplica:
    """A worker process group on a node, told and heard by its relay."""

    def __init__(self, slot: Slot, relay: ActorHandle, number: int) -> None:
        """The worker group of this number of the relay; a number is used once."""
        self.slot, self._relay, self._number = slot, relay, number
        self.lost = False
        """Whether the relay is gone, or as good as gone."""
        self._told: list[FromWorker] = []
        self._ended: str | None = None
        self._last_words = ""
        self.hearing: ray.ObjectRef | None = self._hear(self._call("start", "tell", self._number))

    def send(self, message: ToWorker) -> None:
        if self._ended is None:
            self._call("send", "tell", self._number, line(message))

    def receive(self) -> list[FromWorker]:
        self._poll()
        told, self._told = self._told, []
        return told

    def ended(self) -> str | None:
        self._poll()
        return self._ended

    def last_words(self) -> str:
        return self._last_words

    def kill(self) -> None:
        self.hearing, self._ended = None, self.ended() or signal.SIGKILL.name
        if not self.lost:
            try:
                ray.get(self._call("kill", "end", self._number), timeout=KILL_S)
            except RayError:
                self.lost = True

    def _poll(self) -> None:
        """Take in what the relay has told since, without waiting, and listen on."""
        if self.hearing is None or not ray.wait([self.hearing], timeout=0)[0]:
            return
        try:
            heard: Heard = ray.get(self.hearing)
        except RayTaskError as error:
            self.hearing, self._ended = None, f"its relay failed: {error.cause}"
            self.lost = True
            return
        except RayError:  # it died, its node did, or it cannot be reached, and may have told what we never heard
            self.hearing, self._ended = None, "its node is gone, or its relay"
            self.lost = True
            return
        self._told += [from_worker(text) for text in heard.lines]
        self._ended, self._last_words = heard.ended, heard.last_words
        self.hearing = self._hear(None) if heard.ended is None else None

    def _hear(self, started: ray.ObjectRef | None) -> ray.ObjectRef:
        return self._call("hear", "hear", self._number, HEAR_S, started)

    def _call(self, method: str, group: str, *arguments: Any) -> ray.ObjectRef:
        return getattr(self._relay, method).options(concurrency_group=group).remote(*arguments)
