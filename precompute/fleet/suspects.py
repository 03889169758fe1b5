"""Which row kills engines? Pure bookkeeping over the deaths of engines and the rows that were in them.

Every death makes suspects of the rows that were in the engine. They go again first, a quarter as many at once and with
nothing beside them, so that each death leaves at most a quarter of them, until one is alone in the engine that it
kills. A window of 512 rows comes down to one in five deaths, and rows that are innocent leave with the first engine
that lives.

A slot that is broken kills rows that are innocent. So suspects go to another slot than the one on which they were last
in an engine that died, and where there is another, a row must have been alone in engines that died on two of them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from precompute.fleet.replica import Slot

SHRINK = 4
"""A trial takes this part of the suspects at once. Restarts cost minutes, rows seconds, so few deaths are wanted."""
GUILTY = 3
"""Deaths that a row must have been in, alone in the last: a box that kills at random is no proof."""


@dataclass(frozen=True)
class Trial:
    """Suspects of one shard, how many may be in the engine at once, and the slot on which their last engine died."""

    uids: tuple[str, ...]
    window: int
    slot: Slot


class Suspects:
    """Rows that were in an engine when it died and have not finished since."""

    def __init__(self) -> None:
        self._deaths: Counter[str] = Counter()
        self._alone: dict[str, set[Slot]] = defaultdict(set)
        self._trials: dict[int, Trial] = {}

    def died(self, in_engine: Mapping[str, int], slot: Slot, *, elsewhere: bool) -> str | None:
        """An engine died.

        Args:
            in_engine: the rows in it, by uid, each with its shard.
            elsewhere: whether its rows can be tried on another slot than this.

        Returns:
            the row that is found guilty; None while that is not sure.
        """
        self._deaths.update(in_engine.keys())
        if len(in_engine) == 1:
            [(uid, shard)] = in_engine.items()
            self._alone[uid].add(slot)
            if self._deaths[uid] >= GUILTY and (len(self._alone[uid]) > 1 or not elsewhere):
                self.acquit([uid])
                self._trials.pop(shard, None)
                return uid
        by_shard: dict[int, list[str]] = defaultdict(list)
        for uid, shard in in_engine.items():
            by_shard[shard].append(uid)
        window = max(1, len(in_engine) // SHRINK)
        self._trials |= {shard: Trial(tuple(uids), window, slot) for shard, uids in by_shard.items()}
        return None

    def acquit(self, uids: Iterable[str]) -> None:
        """These rows finished, or have been judged."""
        for uid in uids:
            self._deaths.pop(uid, None)
            self._alone.pop(uid, None)

    def trial(self, shard: int) -> Trial | None:
        """The suspects of a shard that is handed out again; None when it has none."""
        return self._trials.get(shard)

    def committed(self, shard: int) -> None:
        """All of the shard is safe."""
        self._trials.pop(shard, None)
