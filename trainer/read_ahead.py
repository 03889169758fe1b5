"""The shards of a run in the order in which its steps need them, fetched by threads before they are needed.

The plan says for every shard the first and the last step that takes rows from it, so nothing here guesses: a shard is
fetched when it is next in that order and there is room, and let go after its last step. Steps draw from a window of
`shuffle_shards` shards, so room for that many is enough to go on, and `read_ahead` more is what hides the store.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from common.dataset import Dataset
from common.lengths import RowLengths
from common.schema import Rollout, to_rows
from trainer import epoch
from trainer.config import TrainConfig

UNREAD = ("prompt", "completion", "meta")
"""Text for people, which is checked with the rest of the shard and then let go."""
ROW_BYTES = 256
"""Of a row beside its tokens, about: its names, and where its lists begin."""


class Visit(NamedTuple):
    """One stay of a shard in memory; steps are counted over all epochs."""

    shard: int
    first: int
    last: int


def room(config: TrainConfig) -> int:
    """Shards held at once, at most."""
    return config.shuffle_shards + config.read_ahead


def held_bytes(dataset: Dataset, config: TrainConfig) -> int:
    """Bytes of the shards held at once, at most, as their commits say; those being read take their text on top."""
    per_token = 8 + 4 * (dataset.kind == "scored") + 8 * dataset.topk
    sizes = (4 * c.prompt_tokens + per_token * c.tokens + ROW_BYTES * c.rows for c in dataset.shards)
    return sum(sorted(sizes, reverse=True)[: room(config)])


def epoch_order(lengths: RowLengths, config: TrainConfig, number: int) -> np.ndarray:
    """The rows in the order of epoch `number`, (rows,)."""
    return epoch.shuffled(lengths.shard, seed=config.seed, epoch=number, shuffle_shards=config.shuffle_shards)


def visits(lengths: RowLengths, config: TrainConfig, first: int, stop: int) -> Iterator[Visit]:
    """The visits that the steps [first, stop) take, by the first row they need; a dataset that fits stays."""
    shards = np.unique(lengths.shard)
    if len(shards) <= room(config):
        yield from (Visit(int(shard), first, stop - 1) for shard in shards)
        return
    per_epoch = epoch.steps_per_epoch(len(lengths), config.rows_per_step)
    for number in range(first // per_epoch, -(-stop // per_epoch)):
        begin = number * per_epoch
        in_order = lengths.shard[epoch_order(lengths, config, number)]
        names, firsts = np.unique(in_order, return_index=True)
        lasts = len(in_order) - 1 - np.unique(in_order[::-1], return_index=True)[1]
        for place in np.argsort(firsts, kind="stable"):
            opens, closes = (begin + int(rows[place]) // config.rows_per_step for rows in (firsts, lasts))
            if closes >= first and opens < stop:
                yield Visit(int(names[place]), opens, closes)


class ReadAhead:
    """Rows of the steps [first, stop), asked for in that order.

    Raises what `Dataset.read_shard` raises, when the first row of that shard is asked for.
    """

    def __init__(self, dataset: Dataset, lengths: RowLengths, config: TrainConfig, first: int, stop: int) -> None:
        self._dataset, self._lengths, self._room = dataset, lengths, room(config)
        self._coming = visits(lengths, config, first, stop)
        self._held: list[tuple[Visit, Future[pa.Table]]] = []  # by the first row that is needed
        self._threads = ThreadPoolExecutor(config.read_ahead, thread_name_prefix="shard")

    def __enter__(self) -> "ReadAhead":
        self._fetch_more()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    def rows(self, step: int, numbers: Sequence[int]) -> dict[int, Rollout]:
        """The rows with these numbers, which are rows of `step`, by number. Shards that end here make room."""
        wanted: dict[int, list[int]] = {}
        for number in numbers:
            wanted.setdefault(int(self._lengths.shard[number]), []).append(number)
        found: dict[int, Rollout] = {}
        place = 0
        while place < len(self._held) and self._held[place][0].first <= step:
            visit, table = self._held[place]
            if here := wanted.pop(visit.shard, []):
                found |= zip(here, rows_of(table.result(), self._lengths.row[here]), strict=True)
            if visit.last > step:
                place += 1
            else:
                del self._held[place], table
                self._fetch_more()
        return found

    def _fetch_more(self) -> None:
        while len(self._held) < self._room and (visit := next(self._coming, None)) is not None:
            self._held.append((visit, self._threads.submit(read_lean, self._dataset, visit.shard)))


def read_lean(dataset: Dataset, shard: int) -> pa.Table:
    """A shard, checked whole, without the texts that nobody reads in training."""
    table = dataset.read_shard(shard)
    for name in UNREAD:
        table = table.set_column(table.column_names.index(name), name, pa.repeat("", len(table)))
    return table.combine_chunks()  # else every `take` would copy it whole


def rows_of(table: pa.Table, rows: np.ndarray) -> list[Rollout]:
    """Some rows of a shard, copied, so that they do not keep the whole of it in memory."""
    return to_rows(table.take(pa.array(rows, pa.int32())))
