"""What can go wrong between a client and an S3 server, which requests it happens to, and how often it did."""

import random
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """One way to go wrong."""

    DROP = "request dropped"
    """The connection closes before the request reaches the server."""
    LOSE = "answer lost"
    """The server does what it is asked; the connection closes before its answer comes back."""
    STALL = "request late"
    """The request waits for `seconds` before it reaches the server, its client dead or alive."""
    HANG = "answer late"
    """The server does what it is asked, the answer waits for `seconds`."""
    REFUSE = "refused"
    """The request never reaches the server and is answered with `status` and S3's `code` for it."""
    CUT = "answer cut"
    """The body breaks off in the middle of what Content-Length promised."""
    SHORTEN = "answer shortened"
    """The body ends early and Content-Length agrees with it."""
    FLIP = "answer flipped"
    """One bit of the body is another."""
    ALTER = "upload flipped"
    """One bit of the request's body is another."""
    FORGET = "condition ignored"
    """A create-only write becomes a plain one, as in stores that do not know `If-None-Match`."""


OF_ANSWERS = {Kind.CUT, Kind.SHORTEN, Kind.FLIP}
"""These happen to what a GET finds, and to no other answer."""
OF_UPLOADS = {Kind.ALTER, Kind.FORGET}
"""These happen to PUTs alone."""


@dataclass(frozen=True)
class Fault:
    """A way to go wrong, for requests of `method` whose path and query hold `path`; an empty string means any."""

    kind: Kind
    method: str = ""
    path: str = ""
    times: int | None = None
    """How many requests it happens to; None for no end of it."""
    chance: float = 1.0
    """How likely it happens to each."""
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 0.0
    checksums: bool = False
    """Whether an altered answer keeps the server's checksum headers, by which botocore itself would notice."""

    @property
    def label(self) -> str:
        """What it is counted as."""
        return f"{self.kind}: {self.status} {self.code}" if self.kind == Kind.REFUSE else self.kind.value

    def fits(self, method: str, path: str) -> bool:
        """Whether it can happen to such a request."""
        if (self.kind in OF_ANSWERS and method != "GET") or (self.kind in OF_UPLOADS and method != "PUT"):
            return False
        return self.method in ("", method) and self.path in path


@dataclass(frozen=True)
class Request:
    """A request that came, the server's answer to it (None when it was not asked) and what went wrong."""

    method: str
    path: str
    status: int | None
    fault: Kind | None


class Faults:
    """Faults for a proxy to inject; the first that fits a request and is due happens to it.

    Safe to use from many threads. The same seed gives the same choices for the same order of requests.
    """

    def __init__(self, *faults: Fault, seed: int = 0) -> None:
        self.requests: list[Request] = []
        self.injected: Counter[str] = Counter()
        """How often each kind happened, refusals by their code."""
        self._faults = faults
        self._left = {index: fault.times for index, fault in enumerate(faults)}
        self._random = random.Random(seed)
        self._changed = threading.Condition()

    def choose(self, method: str, path: str) -> Fault | None:
        """What shall happen to the request at hand."""
        with self._changed:
            for index, fault in enumerate(self._faults):
                left = self._left[index]
                if left != 0 and fault.fits(method, path) and self._random.random() < fault.chance:
                    self._left[index] = None if left is None else left - 1
                    return fault
        return None

    def count(self, fault: Fault) -> None:
        """Note that the fault happens now."""
        with self._changed:
            self.injected[fault.label] += 1
            self._changed.notify_all()

    def wait_for(self, label: str, times: int = 1, timeout: float = 60) -> None:
        """Return once faults of this label have happened so many times; raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.injected[label] >= times, timeout):
                raise TimeoutError(f"{label}: {self.injected[label]} of {times} in {timeout} s")

    def flipped(self, body: bytes) -> bytes:
        """`body` with one bit changed, anywhere in it."""
        with self._changed:
            bit = self._random.randrange(8 * len(body))
        altered = bytearray(body)
        altered[bit // 8] ^= 1 << bit % 8
        return bytes(altered)

    def statuses(self, method: str, path: str) -> list[int | None]:
        """The server's answers to the requests of `method` whose path holds `path`, the lost ones included."""
        return [request.status for request in self.requests if request.method == method and path in request.path]


Failing = Callable[..., AbstractContextManager[Faults]]
"""The fixture `failing`: `with failing(fault, ...) as faults`."""
FOR_EVER = 300.0
"""Seconds of a stall that only the end of the proxy ends."""
