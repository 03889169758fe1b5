"""One replica as the supervisor keeps its books: what it does, what it holds, and when it was last heard of."""

from collections.abc import Callable
from typing import cast

from precompute.config import Fleet
from precompute.fleet.messages import Beat, Committed, Failed, FromWorker, Refused, State, ToWorker, Want, Work
from precompute.fleet.rate import Rate
from precompute.fleet.replica import Replica
from precompute.fleet.status import ReplicaState, ReplicaStatus

LEAVE_S = 20.0
"""What a worker may take to go once it has nothing to do: vLLM clears away what else would stay in shared memory."""
STORE_S = 600.0
"""A store that takes requests and never answers may keep one operation so long, beyond what it is waited for."""


class Member:
    """A replica from its start to its end; the one that takes its place on the slot is another member."""

    def __init__(self, replica: Replica, window: int, clock: Callable[[], float]) -> None:
        """
        Args:
            window: rows that its engine takes at once.
        """
        self.replica, self.window, self._clock = replica, window, clock
        self.state: ReplicaState = "starting"
        self.detail = ""
        self.shards: set[int] = set()
        """Handed out to it, and not known to be committed."""
        self.in_engine: dict[str, int] = {}
        """Rows in its engine by uid, each with its shard."""
        self.wants: Want | None = None
        self.failure: Failed | None = None
        self.dismissed = False
        """Whether it was told that nothing is left, so that its end is no death."""
        self.rows = self.tokens = 0
        self._heard = self._since = clock()
        self._rate = Rate(self._heard)

    def hear(self, message: FromWorker) -> None:
        """Note what it says of itself."""
        self._heard = self._clock()
        if isinstance(message, State):
            if self.loads:
                self._rate = Rate(self._heard)  # what it does until it comes to work is not slow work
            self.state, self.detail, self._since = message.state, message.detail, self._heard
        elif isinstance(message, Want):
            self.wants = message
        elif isinstance(message, Failed):
            self.failure = message
        elif isinstance(message, Beat):
            self.in_engine |= {uid: shard for shard, uid in message.entered}
            for uid in message.left:
                self.in_engine.pop(uid, None)
            self.rows += len(message.left)
            self.tokens += message.tokens
            self._rate.add(self._heard, message.tokens)
        elif isinstance(message, Refused):
            self.in_engine.pop(message.uid, None)
        elif isinstance(message, Committed):
            self.shards.discard(message.shard)

    def tell(self, message: ToWorker) -> None:
        self.replica.send(message)

    def give(self, work: Work) -> None:
        """A shard that it wants. From now on one that was idle must be heard of again."""
        assert self.wants is not None, "only who wants work is given any"
        self.shards.add(work.shard)
        if self.wants.idle:
            self.state = "storing"
            self._heard = self._since = self._clock()
        self.wants = None
        self.tell(work)

    def silent(self) -> float:
        """Seconds since it was heard of."""
        return self._clock() - self._heard

    def hung(self, fleet: Fleet) -> bool:
        """Whether it has been silent for longer than what it does may take."""
        if self.failure is not None:
            return self.silent() > LEAVE_S
        limits = {
            "starting": fleet.startup_s,
            "loading": fleet.startup_s,
            "idle": float("inf"),  # it waits for us
        }
        waits = self._clock() - self._since if self.state == "storing" else 0.0
        return (
            self.silent() > limits.get(self.state, fleet.hang_s)
            or waits > fleet.storage_patience_s + STORE_S + fleet.hang_s
        )

    @property
    def loads(self) -> bool:
        """Whether it has not come to work yet."""
        return self.state in ("starting", "loading")

    @property
    def workless(self) -> bool:
        """Whether it waits for work, or will soon."""
        return not self.shards and (self.loads or self.state in ("idle", "testing"))

    def status(self, deaths: int, *, draining: bool) -> ReplicaStatus:
        """As it is shown; `deaths` are those of its slot."""
        slot = self.replica.slot
        return ReplicaStatus(
            name=slot.name,
            devices=",".join(map(str, slot.devices)) or "cpu",
            state=cast("ReplicaState", "draining") if draining and not self.loads else self.state,
            detail=self.detail,
            shards=tuple(sorted(self.shards)),
            in_engine=len(self.in_engine),
            rows=self.rows,
            tokens=self.tokens,
            tokens_per_s=self._rate.per_s(self._clock()) or 0.0,
            deaths=deaths,
            beat_age_s=self.silent(),
        )
