"""Is a slot worth another engine? Pure bookkeeping over the deaths of engines, by slot.

A GPU that is broken kills every engine and every row that it is given, and must neither end the job of the others nor
have row after row rejected. So each slot is judged by its own deaths alone, until an engine of its own commits.
"""

from collections import Counter
from collections.abc import Iterable

from common.errors import RetryLater
from precompute.fleet.replica import Slot

FAILED_STARTS = 3
"""Engines of a slot that may die one after another before any of them came to work."""


class Deaths:
    """Engines that died on each slot.

    Args:
        most: how many of one slot may die without a shard committed by it in between.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._all, self._in_a_row, self._unstarted = Counter[Slot](), Counter[Slot](), Counter[Slot]()
        self._finished = True
        """Whether any engine has finished a row since one was convicted; the first needs no such proof."""
        self._last = self._said = ""

    def died(self, slot: Slot, *, loading: bool, why: str, said: str) -> None:
        """An engine died.

        Args:
            loading: whether it had not come to work yet.
            said: the last line of what it wrote.
        """
        self._all[slot] += 1
        self._in_a_row[slot] += 1
        self._unstarted[slot] = self._unstarted[slot] + 1 if loading else 0
        self._last, self._said = why, said

    def committed(self, slot: Slot) -> None:
        """An engine of this slot committed a shard: the slot is well."""
        del self._in_a_row[slot], self._unstarted[slot]

    def finished(self) -> None:
        """An engine finished a row."""
        self._finished = True

    def convicted(self) -> None:
        """The last deaths are a row's; unless nothing else gets done either, for then it is not the rows."""
        if self._finished:
            self._in_a_row.clear()
        self._finished = False

    def of(self, slot: Slot) -> int:
        """All that died on this slot."""
        return self._all[slot]

    def hopeless(self, slot: Slot) -> bool:
        """Whether it gets no engine any more."""
        return self._in_a_row[slot] > self._most or self._unstarted[slot] >= FAILED_STARTS

    def hope_beside(self, slot: Slot, slots: Iterable[Slot]) -> bool:
        """Whether another of these slots than this one still gets engines."""
        return any(other != slot and not self.hopeless(other) for other in slots)

    def require_hope(self, slots: Iterable[Slot]) -> None:
        """
        Raises:
            RetryLater: all of these slots are hopeless; nothing is raised where there are none.
        """
        given_up = list(slots)
        if given_up and all(map(self.hopeless, given_up)):
            died = sum(self._in_a_row[slot] for slot in given_up)
            raise RetryLater(
                f"{died} engines died one after another without a shard committed; the last: {self._last}",
                where=self._said,
                fix="The same command resumes. A smaller engine.max_num_seqs takes less memory",
            )
