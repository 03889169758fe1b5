"""From a dataset to the micro-batches of every step, read and packed ahead of the training by threads.

Memory is bounded: the shards of a shuffle window and those read ahead (`read_ahead.py`), and the batches of two steps.
The plan says what comes, so nothing here is random and nothing needs saving.
"""

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice

from common.dataset import Dataset
from common.errors import DataError
from common.lengths import RowLengths
from common.progress import size
from common.schema import Rollout
from trainer import epoch
from trainer.batch import Batch, pack
from trainer.config import TrainConfig
from trainer.read_ahead import ReadAhead, epoch_order, held_bytes, read_lean, room, rows_of
from trainer.world import World

READERS = 4
"""Shards read at the same time for scattered rows."""
LOOKED_AT = 200
"""Steps whose packing is measured before the run."""


class Reader:
    """Rows of a dataset by number, in the order asked for; for few rows that are scattered over it."""

    def __init__(self, dataset: Dataset, lengths: RowLengths) -> None:
        self.dataset, self.lengths = dataset, lengths

    def rows(self, numbers: Sequence[int]) -> list[Rollout]:
        """The rows with these numbers; every shard is read once. Raises DataError for a missing or altered shard."""
        wanted: dict[int, list[int]] = {}
        for number in numbers:
            wanted.setdefault(int(self.lengths.shard[number]), []).append(number)
        found: dict[int, Rollout] = {}
        with ThreadPoolExecutor(READERS, thread_name_prefix="rows") as threads:
            for here, rows in zip(wanted.values(), threads.map(self._of_shard, wanted, wanted.values()), strict=True):
                found |= zip(here, rows, strict=True)
        return [found[number] for number in numbers]

    def _of_shard(self, shard: int, numbers: list[int]) -> list[Rollout]:
        return rows_of(read_lean(self.dataset, shard), self.lengths.row[numbers])


def check_budget(dataset: Dataset, lengths: RowLengths, budget: int) -> None:
    """Refuse a dataset with a row that no micro-batch can hold, naming the row."""
    longest = int(lengths.total.argmax())
    if (tokens := lengths.total[longest]) > budget:
        uid = dataset.read_shard(int(lengths.shard[longest]), columns=["uid"])["uid"][int(lengths.row[longest])]
        raise DataError(
            f"{(lengths.total > budget).sum()} rows do not fit token_budget={budget}; the longest has {tokens} tokens",
            where=f"{dataset.url}, row {uid}",
            fix=f"Set token_budget={tokens} or more",
        )


def step_plan(lengths: RowLengths, config: TrainConfig, ranks: int, first: int = 0) -> Iterator[epoch.Step]:
    """The steps from `first` on, counted over all epochs and without end, each packed when it is asked for."""
    total = lengths.total
    number, position = divmod(first, epoch.steps_per_epoch(len(lengths), config.rows_per_step))
    while True:
        order = epoch_order(lengths, config, number)[position * config.rows_per_step :]
        for rows in epoch.step_rows(order, config.rows_per_step):
            yield epoch.pack(rows, total, config.token_budget, ranks)
        number, position = number + 1, 0


def plan_line(dataset: Dataset, lengths: RowLengths, config: TrainConfig, ranks: int) -> str:
    """How well the packs of the first steps are filled and balanced, and what the reader holds, for a person."""
    count = min(LOOKED_AT, epoch.steps_per_epoch(len(lengths), config.rows_per_step))
    steps = islice(step_plan(lengths, config, ranks), count)
    found = epoch.quality(steps, lengths.total, config.token_budget, ranks)
    return (
        f"plan: {found.passes:.1f} passes a step, {found.fill:.1%} of token_budget filled, ranks "
        f"{1 - found.balance:.1%} idle; reader: at most {min(room(config), dataset.num_shards)} shards, "
        f"{size(held_bytes(dataset, config))}"
    )


def step_batches(
    reader: Reader, config: TrainConfig, world: World, *, first: int, stop: int, topk: int
) -> Generator[list[Batch], None, None]:
    """This rank's micro-batches of the global steps [first, stop), on the host; as many on every rank."""
    steps = step_plan(reader.lengths, config, world.size, first)
    with ReadAhead(reader.dataset, reader.lengths, config, first, stop) as shards:
        for step, bins in zip(range(first, stop), steps, strict=False):
            mine = epoch.turns(bins, world.rank, world.size)
            rows = shards.rows(step, [row for bin in mine for row in bin])
            yield [pack([rows[row] for row in bin], topk=topk) for bin in mine]


def ahead(batches: Generator[list[Batch], None, None], depth: int = 2) -> Generator[list[Batch], None, None]:
    """The same batches, made by a thread that keeps at most `depth` steps ready; its errors are raised here."""
    ready: queue.Queue[tuple[str, list[Batch] | BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def offer(item: tuple[str, list[Batch] | BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def produce() -> None:
        try:
            with closing(batches):
                for batch in batches:
                    offer(("batches", batch))
                    if stopped.is_set():
                        return
            offer(("end", None))
        except BaseException as error:  # noqa: BLE001 - carried over to the thread that waits, and raised there
            offer(("error", error))

    thread = threading.Thread(target=produce, name="reader", daemon=True)
    thread.start()
    try:
        yield from _received(ready)
    finally:
        stopped.set()
        thread.join()


def _received(ready: "queue.Queue") -> Iterator[list[Batch]]:
    while True:
        kind, item = ready.get()
        if kind == "end":
            return
        if kind == "error":
            raise item
        yield item
