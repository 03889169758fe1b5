"""Sees to it that every shard of a phase gets its commit, though engines die, hang or are taken away.

It holds no model and touches no GPU: it hands out shards, hears which rows are in which engine, ends what hangs, starts
anew what died, and finds out which row an engine dies of. Everything that it knows may be lost: the commits tell
another supervisor all that it needs.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

from common.errors import DataError, RetryLater
from common.rejected import REASON
from precompute.config import Fleet
from precompute.engine.requests import memory_ran_out
from precompute.fleet.deaths import Deaths
from precompute.fleet.failures import as_error, last_line
from precompute.fleet.member import LEAVE_S, Member
from precompute.fleet.messages import Beat, Committed, Drain, FromWorker, Job, Note, Nothing, Refused, Storage, Work
from precompute.fleet.replica import Launcher, Slot
from precompute.fleet.shards import ShardQueue
from precompute.fleet.signals import Signals
from precompute.fleet.suspects import Suspects
from precompute.fleet.tally import Tally

TICK_S = 0.2


class Supervisor:
    """One phase on the replicas of a launcher."""

    def __init__(
        self,
        job: Job,
        fleet: Fleet,
        queue: ShardQueue,
        launcher: Launcher,
        tally: Tally,
        *,
        show: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            show: called some times a second; the tally then holds how it stands.
            say: told what is worth a line of its own.
        """
        self._job, self._fleet, self._queue, self._launcher, self._tally = job, fleet, queue, launcher, tally
        self._show, self._say = show, say
        self._members: dict[Slot, Member] = {}
        self._slots: Sequence[Slot] = ()
        self._suspects = Suspects()
        self._rejected: dict[int, dict[str, str]] = defaultdict(dict)
        self._deaths = Deaths(fleet.max_deaths)
        self._window = job.window
        self._signals = Signals(fleet.grace_s)
        self._placed = time.monotonic()

    def run(self) -> None:
        """Return when every shard has a commit.

        Raises:
            Stopped: a signal came first.
            RetryLater: engines die for no reason that can be found, or the store was away for too long.
            LopdError: a worker met what no other could do better.
        """
        try:
            with self._signals.heeded():
                while not self._queue.finished:
                    self._turn()
                    if self._signals and not self._members:
                        raise self._signals.stopped(self._queue.committed, self._queue.total)
                self._dismiss()
                if self._signals:  # what comes after this phase must not begin
                    raise self._signals.stopped(self._queue.committed, self._queue.total)
        finally:
            self._queue.close()
            for member in self._members.values():
                member.replica.kill()
            self._tally.update([], draining=bool(self._signals))

    def _turn(self) -> None:
        """One round: staff, listen, bury, serve, show."""
        self._queue.refresh()
        self._heed_signals()
        self._staff()
        self._launcher.wait([member.replica for member in self._members.values()], TICK_S)
        for member in list(self._members.values()):
            ended = member.replica.ended()  # asked first: what it said before its end is then all there
            for message in member.replica.receive():
                self._hear(member, message)
            if ended is not None:
                self._bury(member, ended)
            elif member.hung(self._fleet):
                member.replica.kill()
                self._bury(member, f"silent for {member.silent():.0f} s while {member.state}")
        self._serve()
        self._tally.update(self._statuses(), draining=bool(self._signals))
        self._show()

    def _staff(self) -> None:
        """Start a replica on every slot that has none and is worth it, while there is more work than hands."""
        if self._signals or not self._queue.listed:
            return
        self._slots = slots = self._launcher.slots()
        if not self._members:
            self._deaths.require_hope(slots)
        self._require_place(slots)
        for slot in slots:
            if slot not in self._members and not self._deaths.hopeless(slot) and self._is_wanted(slot):
                member = Member(self._launcher.start(slot), self._window, time.monotonic)
                member.tell(self._job.model_copy(update={"window": self._window}))
                self._members[slot] = member

    def _require_place(self, slots: Sequence[Slot]) -> None:
        """A cluster may lose all of its nodes and get others, but nobody waits for them for ever."""
        if slots or self._members:
            self._placed = time.monotonic()
        elif time.monotonic() - self._placed > self._fleet.startup_s:
            raise RetryLater(
                f"there has been no place for an engine for {self._fleet.startup_s:.0f} s (fleet.startup_s)",
                fix="Bring nodes back; the same command resumes",
            )

    def _workless(self) -> int:
        return sum(member.workless for member in self._members.values())

    def _may(self, shard: int, slot: Slot) -> bool:
        """Suspects go to another slot than the one on which they died, as long as there is one: it may be broken."""
        trial = self._suspects.trial(shard)
        return trial is None or trial.slot != slot or not self._deaths.hope_beside(slot, self._slots)

    def _is_wanted(self, slot: Slot) -> bool:
        """Whether there are more shards for it than hands, or one that none of those who wait for work may have."""
        again, waiting = self._queue.again, [other for other, member in self._members.items() if member.workless]
        barred = sum(not self._may(shard, slot) for shard in again)
        return self._queue.left - barred > len(waiting) or any(
            self._may(shard, slot) and not any(self._may(shard, other) for other in waiting) for shard in again
        )

    def _hear(self, member: Member, message: FromWorker) -> None:
        if isinstance(message, Beat):
            self._suspects.acquit(message.left)
            left = [member.in_engine[uid] for uid in message.left if uid in member.in_engine]
            self._tally.rows_left(left, message.tokens)
            if left:
                self._deaths.finished()
        elif isinstance(message, Storage):
            self._tally.storage_retries += 1
            self._say(message.text)
        elif isinstance(message, Note):
            self._say(message.text)
        elif isinstance(message, Refused):
            self._suspects.acquit([message.uid])
            self._reject(message.shard, message.uid, message.reason, message.reason)
        elif isinstance(message, Committed):
            self._queue.done(message.shard)
            self._suspects.committed(message.shard)
            self._tally.committed(message)
            self._deaths.committed(member.replica.slot)
        member.hear(message)

    def _serve(self) -> None:
        """Answer those who want work. One that has some gets more only if enough is left for those who have none."""
        for slot, member in self._members.items():
            if member.wants is None:
                continue
            idle = member.wants.idle
            over = bool(self._signals)
            spare = idle or self._queue.left > self._workless()
            shard = self._queue.take(partial(self._may, slot=slot)) if spare and not over else None
            if shard is not None:
                trial = self._suspects.trial(shard)
                member.give(
                    Work(
                        shard=shard,
                        suspects=trial.uids if trial else (),
                        window=trial.window if trial else None,
                        rejected=self._rejected.get(shard, {}),
                    )
                )
            elif over or not idle:
                member.tell(Nothing(ended=over))
                member.dismissed = idle
                member.wants = None
            # else it waits: a shard may come back from a replica that dies, or be for others only while there are any

    def _bury(self, member: Member, how: str) -> None:
        """A worker has ended: find out of what, and put back what it held."""
        member.replica.kill()  # its engine's processes may have outlived it
        slot = member.replica.slot
        del self._members[slot]
        for shard in member.shards:
            self._queue.put_back(shard)
            self._tally.put_back(shard)
        failure, words = member.failure, member.replica.last_words()
        if failure is not None and not failure.engine:
            raise as_error(failure, words)
        if member.dismissed or self._signals:
            return
        why = failure.text if failure else how
        self._deaths.died(slot, loading=member.loads, why=why, said=last_line(words))
        if member.replica.lost:
            self._say(f"replica {slot.name} is lost: {why}")
            return
        self._tally.deaths += 1
        if (failure is not None and failure.out_of_memory) or memory_ran_out(words):
            self._shrink(member)
        told = f"; it last said: {last_line(words)}" if words else ""
        self._say(f"replica {slot.name} died: {why}; {_rows(len(member.in_engine))} in its engine{told}")
        self._judge(member, why)
        if self._deaths.hopeless(slot):
            self._say(f"replica {slot.name} is given up: too many of its engines have died")

    def _shrink(self, member: Member) -> None:
        """After an engine that ran out of memory, all that start from now on take half as many rows at once as it."""
        half = max(1, member.window // 2)
        if half < self._window:  # others that were as large may run out of memory beside it
            self._window = half
            self._say(f"memory ran out: engines take at most {self._window} rows at once from now on")

    def _judge(self, member: Member, why: str) -> None:
        """Reject the row that engines die of, if it is known by now."""
        slot = member.replica.slot
        elsewhere = self._deaths.hope_beside(slot, self._slots)
        guilty = self._suspects.died(member.in_engine, slot, elsewhere=elsewhere)
        if guilty is None:
            return
        self._deaths.convicted()
        reason = f"engines died of it, alone in the last: {why}"
        self._reject(member.in_engine[guilty], guilty, reason, "engines die of it")

    def _reject(self, shard: int, uid: str, reason: str, told: str) -> None:
        """Leave the row out from now on, whoever makes its shard.

        Raises:
            DataError: too many are.
        """
        if uid in self._rejected[shard]:
            return
        self._rejected[shard][uid] = reason[:REASON]
        self._tally.rejected += 1
        self._say(f"row {uid} is rejected: {told}")
        rejected = self._tally.rejected
        if rejected > self._fleet.max_rejected * self._tally.rows_total:
            raise DataError(
                f"{rejected} row{'s are' if rejected > 1 else ' is'} rejected, and "
                f"fleet.max_rejected = {self._fleet.max_rejected:g} of {self._tally.rows_total}",
                where=self._tally.url,
                fix="Look at what they have in common; what is committed is safe",
                detail=f"the last is {uid}: {reason[:REASON]}",
            )

    def _dismiss(self) -> None:
        """All is committed: let the workers go, and end those that do what another box has done already."""
        for member in self._members.values():
            member.tell(Drain(seconds=0))
        deadline = time.monotonic() + LEAVE_S
        while self._members and time.monotonic() < deadline:
            for slot, member in list(self._members.items()):
                member.replica.receive()
                member.tell(Nothing(ended=True))
                if member.loads or member.replica.ended() is not None:
                    member.replica.kill()
                    del self._members[slot]
            self._launcher.wait([member.replica for member in self._members.values()], TICK_S)

    def _heed_signals(self) -> None:
        """Have the members drain after the first; end those that have no time left, or nothing to finish."""
        if self._signals.begin_grace():
            grace = self._signals.grace_s
            self._say(f"{self._signals.name}: shards in flight may take {grace:.0f} s to their end; once more ends now")
            for member in self._members.values():
                member.tell(Drain(seconds=grace))
        for member in self._members.values():
            if self._signals and (member.loads or self._signals.ends_now):
                member.replica.kill()

    def _statuses(self) -> Sequence[tuple[Member, int]]:
        return [(member, self._deaths.of(slot)) for slot, member in self._members.items()]


def _rows(count: int) -> str:
    return "1 row was" if count == 1 else f"{count} rows were"
