"""Bytes, speed and memory of each layout, on the same rows; every figure from a process of its own."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cost import Cost, in_fresh_process, measured
from benchmarks.layouts import LAYOUTS, parquet_bytes
from benchmarks.rollouts import read_all, tiled
from common.dataset import open_dataset
from common.schema import Rollout, to_rows

RUNS = 3
"""Processes that time one thing. The best counts: whatever else runs on the machine only adds."""


@dataclass(frozen=True)
class Source:
    """The rows to measure, and where to write while measuring."""

    url: str
    scratch: Path

    def rows(self) -> list[Rollout]:
        """All of them, without the top-k, which the other layouts do not have."""
        return [replace(row, topk_ids=None, topk_logprobs=None) for row in read_all(open_dataset(self.url))]

    def plan(self, shards: int) -> dict[str, Any]:
        """A plan of ours for so many shards of these rows."""
        return {**open_dataset(self.url).plan, "topk": 0, "shards": shards}

    def folder(self, name: str, *, empty: bool = False) -> Path:
        """A folder below `scratch`."""
        folder = self.scratch / name
        if empty:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def tokens_of(rows: Iterable[Rollout]) -> int:
    """Completion tokens."""
    return sum(len(row.completion_ids) for row in rows)


def stored_bytes(source: Source, name: str) -> dict[str, int]:
    """Bytes of one file with all rows, each once: `total`, and by column."""
    layout, rows = LAYOUTS[name], source.rows()
    folder = source.folder(f"{name}-bytes", empty=True)
    layout.writer(folder, source.plan(1))(0, layout.hold(rows))
    (file,) = layout.files(folder)
    return layout.leaf_bytes(file)


def topk_bytes(source: Source) -> dict[str, int]:
    """Bytes by column of our file with the teacher's top-k in it; empty when the rows have none."""
    dataset = open_dataset(source.url)
    if not dataset.topk:
        return {}
    folder = source.folder("topk-bytes", empty=True)
    plan = {**dataset.plan, "shards": 1}
    LAYOUTS["ours"].writer(folder, plan)(0, read_all(dataset))
    (file,) = LAYOUTS["ours"].files(folder)
    return parquet_bytes(file)


def speed(source: Source, name: str, passes: int) -> tuple[float, float]:
    """CPU seconds of writing and of reading all rows `passes` times, into as many files: no file repeats a row."""
    write = min(in_fresh_process(_write_passes, source, name, passes).cpu_seconds for _ in range(RUNS))
    read = min(in_fresh_process(_read_passes, source, name, passes).cpu_seconds for _ in range(RUNS))
    return write, read


def _write_passes(source: Source, name: str, passes: int) -> Cost:
    layout, held = LAYOUTS[name], LAYOUTS[name].hold(source.rows())
    layout.writer(source.folder(f"{name}-warm", empty=True), source.plan(1))(0, held)
    write = layout.writer(source.folder(f"{name}-speed", empty=True), source.plan(passes))
    with measured() as cost:
        for number in range(passes):
            write(number, held)
    return cost


def _read_passes(source: Source, name: str, passes: int) -> Cost:
    read = LAYOUTS[name].reader(source.folder(f"{name}-speed"))
    read(0)
    with measured() as cost:
        for number in range(passes):
            read(number)
    return cost


def memory(source: Source, name: str, tokens: int, times: int, *, one_shard: bool = False) -> tuple[int, int]:
    """Peak bytes of writing and of reading `times` times `tokens` tokens: the rows over and over, all at once.

    Ours writes and reads shard by shard, a row group in memory at a time, the others their one file; with `one_shard`
    ours has but one file as well.
    """
    units = [tokens] * times if LAYOUTS[name].by_shard and not one_shard else [tokens * times]
    write = in_fresh_process(_write_units, source, name, units).peak_bytes
    read = in_fresh_process(_read_units, source, name, len(units)).peak_bytes
    shutil.rmtree(source.folder(f"{name}-memory"))
    return write, read


def _write_units(source: Source, name: str, units: Sequence[int]) -> Cost:
    layout, rows = LAYOUTS[name], source.rows()
    layout.writer(source.folder(f"{name}-warm", empty=True), source.plan(1))(0, layout.hold(rows[:1]))
    write = layout.writer(source.folder(f"{name}-memory", empty=True), source.plan(len(units)))
    with measured() as cost:
        for number, tokens in enumerate(units):
            write(number, layout.hold(tiled(rows, tokens)))
    return cost


def _read_units(source: Source, name: str, files: int) -> Cost:
    layout = LAYOUTS[name]
    layout.reader(source.folder(f"{name}-warm"))(0)
    folder = source.folder(f"{name}-memory")
    if layout.by_shard:
        dataset = open_dataset(str(folder))
        with measured() as cost:
            for shard in range(files):
                for table in dataset.iter_row_groups(shard):
                    to_rows(table)
        return cost
    with measured() as cost:
        everything = layout.reader(folder)(0)
    assert everything
    return cost
