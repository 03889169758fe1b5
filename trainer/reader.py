"""From a dataset to the micro-batches of every step, read ahead of the training in one thread.

Memory is bounded: the shards of a shuffle window and the batches of two steps. The plan says what comes, so nothing
here is random and nothing needs saving.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence

import numpy as np

from common.dataset import Dataset, RowLengths
from common.errors import DataError
from common.schema import Rollout, to_rows
from trainer import epoch
from trainer.batch import Batch, pack
from trainer.config import TrainConfig
from trainer.world import World


class Reader:
    """Random access to the rows of a dataset through the last few shards read."""

    def __init__(self, dataset: Dataset, lengths: RowLengths, cached_shards: int) -> None:
        self.dataset, self.lengths, self._cached = dataset, lengths, cached_shards
        self._shards: OrderedDict[int, list[Rollout]] = OrderedDict()

    def rows(self, indices: Sequence[int]) -> list[Rollout]:
        """The rows with these numbers, in this order. Raises DataError for a missing or altered shard."""
        return [self._row(int(self.lengths.shard[i]), int(self.lengths.row[i])) for i in indices]

    def _row(self, shard: int, row: int) -> Rollout:
        if shard not in self._shards:
            while len(self._shards) >= self._cached:
                self._shards.popitem(last=False)
            self._shards[shard] = to_rows(self.dataset.read_shard(shard))  # their arrays are views of the table
        self._shards.move_to_end(shard)
        return self._shards[shard][row]


def check_budget(dataset: Dataset, lengths: RowLengths, budget: int) -> None:
    """Refuse a dataset with a row that no micro-batch can hold, naming the row."""
    total = lengths.prompt.astype(np.int64) + lengths.completion
    longest = int(total.argmax())
    if total[longest] > budget:
        uid = dataset.read_shard(int(lengths.shard[longest]), columns=["uid"])["uid"][int(lengths.row[longest])]
        count = int((total > budget).sum())
        raise DataError(
            f"{count} rows do not fit token_budget={budget}; the longest has {total[longest]} tokens",
            where=f"{dataset.url}, row {uid}",
            fix=f"Set token_budget={total[longest]} or more",
        )


def step_plan(lengths: RowLengths, config: TrainConfig, number: int) -> list[epoch.Step]:
    """The steps of epoch `number`."""
    return epoch.plan(
        lengths.prompt.astype(np.int64) + lengths.completion,
        lengths.shard,
        seed=config.seed,
        epoch=number,
        token_budget=config.token_budget,
        rows_per_step=config.rows_per_step,
        shuffle_shards=config.shuffle_shards,
    )


def step_batches(
    reader: Reader, config: TrainConfig, world: World, *, first: int, stop: int, topk: int
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of the global steps [first, stop), on the host; as many on every rank."""
    per_epoch = epoch.steps_per_epoch(len(reader.lengths.row), config.rows_per_step)
    steps: list[epoch.Step] = []
    for step in range(first, stop):
        number, position = divmod(step, per_epoch)
        if not steps or position == 0:
            steps = step_plan(reader.lengths, config, number)
        turns = epoch.turns(steps[position], world.rank, world.size)
        yield [pack(reader.rows(rows), topk=topk) for rows in turns]


def ahead(batches: Iterator[list[Batch]], depth: int = 2) -> Generator[list[Batch], None, None]:
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
