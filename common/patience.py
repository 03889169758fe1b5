"""Waiting for a store that fails for a while: what a job on a rented box holds is worth more than the wait.

`Store` itself tries an operation for about half a minute. This is the layer above it, for outages of minutes. All
that is a `RetryLater` is waited for. Credentials that have expired are among it, because an instance's role or a
profile may be renewed at any time, and `Store` reads them anew after such a refusal; a `StorageError` (no permission,
no bucket, no space) is a person's to mend and goes on at once.
"""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from common.errors import RetryLater
from common.progress import duration

Result = TypeVar("Result")
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
TOLD_EVERY_S = 60.0
"""How often it is said that it still waits."""
LOOK_EVERY_S = 0.1
"""How soon a wait ends that is called off."""


def never() -> bool:
    """For a wait that nothing calls off."""
    return False


def patiently(
    operation: Callable[[], Result], seconds: float, say: Callable[[str], None], stopping: Callable[[], bool] = never
) -> Result:
    """What `operation` returns, tried again with growing pauses while the store is away. For any thread.

    Args:
        operation: may run any number of times; whatever it does twice must be as if done once.
        seconds: from the first failure on, how long a store may be away.
        say: told once that it waits (where, why, how long), now and then that it still does, and that it is over.
        stopping: asked several times a second during a wait; once it says yes, the failure goes on.

    Raises:
        RetryLater: the store was away for longer, or the wait was called off.
        LopdError: what no wait can mend, as the operation raised it.
    """
    since = told = 0.0
    pause = 0.0
    while True:
        try:
            result = operation()
        except RetryLater as error:
            now = time.monotonic()
            if not pause:
                since = told = now
            left = since + seconds - now
            if left <= 0 or stopping():
                raise
            if not pause:
                say(f"{error.where}: {error.what}; trying again for {duration(seconds)}")
            elif now - told >= TOLD_EVERY_S:
                told = now
                say(f"{error.where}: {error.what} since {duration(now - since)}; giving up in {duration(left)}")
            pause = min(2 * pause or FIRST_PAUSE_S, LONGEST_PAUSE_S)
            if not _waited(min(random.uniform(0.5, 1) * pause, left), stopping):
                raise
        else:
            if pause:
                say(f"the store is back after {duration(time.monotonic() - since)}")
            return result


def _waited(seconds: float, stopping: Callable[[], bool]) -> bool:
    """Whether the wait came to its end."""
    end = time.monotonic() + seconds
    while not stopping():
        left = end - time.monotonic()
        if left <= 0:
            return True
        time.sleep(min(left, LOOK_EVERY_S))
    return False
