"""The shards that are left of a dataset in the making, for the replicas of one box.

Other boxes may work on the same dataset and nobody asks them: only commits count, and a fresh listing shows them. So
nothing here is needed for correctness; it only keeps boxes from doing the same work twice, and the supervisor's loop
from waiting for a store.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

from common.dataset_writer import LISTING_SHARE, DatasetWriter
from common.patience import patiently
from common.records import committed_shards

LISTING_PAUSE_S = 1.0
"""Between two listings, at least: each of them costs a request, which stores charge for."""


class ShardQueue:
    """Which shard a replica of this box takes next. For one thread; it never waits for the store.

    Nothing is handed out before the first listing has come back: call `refresh` again and again.

    Args:
        order: all shards of the dataset, as `visiting_order` has them.
        listing: of the shards that have a commit.
    """

    def __init__(self, order: Sequence[int], listing: "Listing") -> None:
        self.total = len(order)
        self._left, self._again = deque(order), deque[int]()
        self._out: set[int] = set()
        self._committed: set[int] = set()
        self._listing = listing

    @classmethod
    def of(
        cls, writer: DatasetWriter, index: int, count: int, *, patience_s: float, say: Callable[[str], None]
    ) -> "ShardQueue":
        """For box `index` of `count` that work on the dataset of `writer`.

        Args:
            patience_s: how long the store may be away before `refresh` raises.
            say: told, in another thread, when a listing has to wait for the store and when it is back.
        """
        listing = Listing(lambda: committed_shards(writer.store), patience_s, say)
        return cls(visiting_order(writer.plan["shards"], index, count), listing)

    @property
    def listed(self) -> bool:
        """Whether the first listing has come back."""
        return self._listing.came

    @property
    def committed(self) -> int:
        """Shards that are known to have a commit, anybody's."""
        return len(self._committed)

    @property
    def left(self) -> int:
        """Shards that could be taken now."""
        return self.total - len(self._committed) - len(self._out - self._committed) if self.listed else 0

    @property
    def finished(self) -> bool:
        """Whether every shard has a commit."""
        return self.committed == self.total

    @property
    def again(self) -> Sequence[int]:
        """Shards whose replica has died, and that could be taken now."""
        return [shard for shard in self._again if self._is_open(shard)]

    def take(self, may: Callable[[int], bool] = lambda shard: True) -> int | None:
        """A shard to do; None when there is nothing for now.

        Then the rest is in flight on this box, or the first listing is still out; `finished` tells whether any is left.

        Args:
            may: whether who asks may have this shard; those that it may not have keep their place.
        """
        if not self.listed:
            return None
        for waiting in (self._again, self._left):
            shard = self._first(waiting, may)
            if shard is not None:
                self._out.add(shard)
                return shard
        return None

    def put_back(self, shard: int) -> None:
        """The replica that held it has died: it comes again, before all others."""
        self._out.discard(shard)
        self._again.append(shard)

    def done(self, shard: int) -> None:
        """A replica of this box says that the shard has a commit, its own or another's."""
        self._out.discard(shard)
        self._committed.add(shard)

    def refresh(self) -> None:
        """Take in what the last listing saw, and start the next when it is time. Returns at once.

        Raises:
            RetryLater: the store was away for longer than it may be.
            LopdError: the listing failed otherwise.
        """
        self._committed.update(shard for shard in self._listing.poll() if shard < self.total)

    def close(self) -> None:
        """No more listings; one that waits for the store is called off."""
        self._listing.close()

    def _first(self, waiting: deque[int], may: Callable[[int], bool]) -> int | None:
        """Remove the first that may be had, and those before it that nobody needs any more."""
        found, passed = None, list[int]()
        while waiting and found is None:
            shard = waiting.popleft()
            if self._is_open(shard):
                found = shard if may(shard) else None
                passed += [shard] if found is None else []
        waiting.extendleft(reversed(passed))
        return found

    def _is_open(self, shard: int) -> bool:
        return shard not in self._committed and shard not in self._out


class Listing:
    """The commits of a dataset, listed over and over in a thread beside the caller's.

    Takes at most `LISTING_SHARE` of the time, however long one listing lasts, and rests for `pause_s` at least.
    """

    def __init__(
        self,
        ask: Callable[[], Collection[int]],
        patience_s: float,
        say: Callable[[str], None],
        pause_s: float = LISTING_PAUSE_S,
    ) -> None:
        self.came = False
        self._ask, self._patience_s, self._say, self._pause_s = ask, patience_s, say, pause_s
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._found: Collection[int] = ()
        self._failure: Exception | None = None
        self._next = 0.0

    def poll(self) -> Iterable[int]:
        """What the listing saw that came back since the last call, if any; raises what stopped it."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
            if self._failure is not None:
                raise self._failure
            self.came = True
            return self._found
        if self._thread is None and not self._closed.is_set() and time.monotonic() >= self._next:
            # A daemon, for the end of the job must not wait for a store that is away.
            self._thread = threading.Thread(target=self._list, name="listing", daemon=True)
            self._thread.start()
        return ()

    def close(self) -> None:
        self._closed.set()

    def _list(self) -> None:
        started = 0.0

        def ask() -> Collection[int]:
            nonlocal started
            started = time.monotonic()
            return self._ask()

        try:
            self._found = patiently(ask, self._patience_s, self._say, self._closed.is_set)
        except Exception as error:  # noqa: BLE001 - raised again in the caller's thread, by `poll`
            self._failure = error
        ended = time.monotonic()
        self._next = ended + max(self._pause_s, (ended - started) * (1 / LISTING_SHARE - 1))


def visiting_order(total: int, index: int, count: int) -> list[int]:
    """All shards in the order in which box `index` of `count` visits them.

    Its own slice comes first, from its beginning. The others' follow at random, so that boxes which have done their
    own meet on few shards, however many they are. A lone box goes at random from the start: it cannot know whether
    another was started beside it.
    """
    own = range(total * index // count, total * (index + 1) // count) if count > 1 else range(0)
    others = [shard for shard in range(total) if shard not in own]
    random.shuffle(others)
    return [*own, *others]
