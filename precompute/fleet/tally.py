"""What a phase has come to so far, counted from what its workers say."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from common.filtered import dropped
from common.status_files import box_name
from precompute.config import Fleet
from precompute.fleet.member import Member
from precompute.fleet.messages import Committed
from precompute.fleet.rate import Rate, cost_of, eta_s
from precompute.fleet.shards import ShardQueue
from precompute.fleet.status import Phase, ReplicaStatus, State, Status

ROWS_S = 600.0
"""The time left is told by the rows of so long: those of a minute are few, and it would jump."""


class Tally:
    """Counts of one phase on one box."""

    def __init__(
        self, phase: Phase, url: str, dataset_id: str, rows_total: int, fleet: Fleet, queue: ShardQueue
    ) -> None:
        self.url, self.rows_total = url, rows_total
        self.deaths = self.rejected = self.storage_retries = 0
        self.reason = ""
        self._phase: Phase = phase
        self._dataset_id, self._price, self._queue = dataset_id, fleet.price_per_hour, queue
        self._started, self._started_at = time.monotonic(), _now()
        self._in_flight: Counter[int] = Counter()  # rows finished here, by shard without a commit
        self._shards_here = self._seen = self._tokens = 0
        self._truncated = 0.0
        self._self_test: float | None = None
        self._token_rate, self._row_rate = Rate(self._started), Rate(self._started, ROWS_S)
        self._replicas: tuple[ReplicaStatus, ...] = ()
        self._draining = self._working = False

    def rows_left(self, shards: Iterable[int], tokens: int) -> None:
        """Rows of these shards, one entry a row, left an engine; their completions have so many tokens."""
        rows, now = list(shards), time.monotonic()
        self._in_flight.update(rows)
        self._tokens += tokens
        self._token_rate.add(now, tokens)
        self._row_rate.add(now, len(rows))

    def put_back(self, shard: int) -> None:
        """What was finished of this shard is lost with its worker."""
        self._in_flight.pop(shard, None)

    def committed(self, message: Committed) -> None:
        """A worker of ours committed a shard."""
        self._in_flight.pop(message.shard, None)
        self._shards_here += 1
        cut_off = message.stats.get("dropped_truncated")
        self._truncated += message.stats.get("truncated", 0.0) + (cut_off or 0.0)
        # What else was dropped is not known to be cut off or not, unless those cut off fell first.
        self._seen += message.rows + (0 if cut_off is None else sum(dropped([message.stats]).values()))
        if "self_test" in message.stats:
            self._self_test = max(self._self_test or 0.0, message.stats["self_test"])

    def update(self, members: Sequence[tuple[Member, int]], *, draining: bool) -> None:
        """The replicas as they are now, each with the deaths of its slot."""
        self._replicas = tuple(member.status(deaths, draining=draining) for member, deaths in members)
        self._draining = draining
        if not self._working and any(replica.state == "running" for replica in self._replicas):
            self._working = True
            now = time.monotonic()
            self._token_rate, self._row_rate = Rate(now), Rate(now, ROWS_S)

    def status(self) -> Status:
        """How it stands now."""
        now = time.monotonic()
        done = self._rows_done()
        return Status(
            phase=self._phase,
            url=self.url,
            dataset_id=self._dataset_id,
            box=box_name(),
            started_at=self._started_at,
            updated_at=_now(),
            seconds=now - self._started,
            state=self._state(),
            reason=self.reason,
            shards_total=self._queue.total,
            shards_done=self._queue.committed,
            shards_here=self._shards_here,
            rows_total=self.rows_total,
            rows_done=done,
            tokens=self._tokens,
            tokens_per_s=self._token_rate.per_s(now) or 0.0,
            eta_s=eta_s(self.rows_total - done, self._row_rate.per_s(now)),
            cost=cost_of(now - self._started, self._price),
            truncated=self._truncated / self._seen if self._seen else None,
            rejected=self.rejected,
            deaths=self.deaths,
            storage_retries=self.storage_retries,
            self_test=self._self_test,
            replicas=self._replicas,
        )

    def _rows_done(self) -> int:
        """Shards are of one size, but for the last, so their share is that of the rows."""
        committed = round(self.rows_total * self._queue.committed / self._queue.total)
        return min(self.rows_total, committed + self._in_flight.total())

    def _state(self) -> State:
        if self._queue.finished:
            return "complete"
        if self.reason:
            return "stopped" if self._draining else "failed"
        if self._draining:
            return "draining"
        return "running" if self._working else "starting"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
