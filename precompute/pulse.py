"""What a worker's step loop tells its supervisor while it runs: who is in the engine, who left, and that it steps."""

import time
from collections.abc import Callable, Sequence

from common.rejected import REASON
from precompute.fleet.channel import Channel
from precompute.fleet.messages import Beat, Refused
from precompute.tasks import Row

BEAT_S = 1.0
"""Between two beats of the step loop."""


class Drained(Exception):
    """The time to finish what is in flight is over."""


class Pulse:
    """Tells the supervisor which rows are in the engine and that it steps; ends the step loop when time is over."""

    def __init__(self, channel: Channel, rescue: Callable[[], None]) -> None:
        """`rescue` saves what the engine is not needed for, once it is gone."""
        self._channel, self._rescue = channel, rescue
        self._shards: dict[str, int] = {}
        self._left: list[str] = []
        self._refused: list[Refused] = []
        self._tokens, self._told = 0, 0.0

    def expect(self, rows: Sequence[Row]) -> None:
        """These rows are about to enter."""
        self._shards |= {row.uid: row.shard for row in rows}

    def entering(self, uids: Sequence[str]) -> None:
        self._tell(tuple((self._shards[uid], uid) for uid in uids if uid in self._shards))

    def refused(self, uid: str, reason: str) -> None:
        shard = self._shards.pop(uid, None)
        if shard is None:  # told already: the self-test asks for a row several times
            return
        refused = Refused(shard=shard, uid=uid, reason=reason[:REASON])
        self._channel.tell(refused)  # at once: the next row may kill the engine, and this one was never in it
        self._refused.append(refused)

    def take_refused(self) -> list[Refused]:
        """Rows that the engine would not take, since the last call."""
        refused, self._refused = self._refused, []
        return refused

    def dying(self) -> None:
        self._rescue()

    def stepped(self) -> None:
        if self._channel.overdue():
            raise Drained
        if time.monotonic() - self._told >= BEAT_S:
            self._tell(())

    def finished(self, uid: str, tokens: int) -> None:
        """This row left the engine."""
        self._left.append(uid)
        self._shards.pop(uid, None)
        self._tokens += tokens

    def flush(self) -> None:
        """Tell what is not told yet."""
        self._tell(())

    def _tell(self, entered: tuple[tuple[int, str], ...]) -> None:
        self._channel.tell(Beat(entered=entered, left=tuple(self._left), tokens=self._tokens))
        self._left, self._tokens, self._told = [], 0, time.monotonic()
