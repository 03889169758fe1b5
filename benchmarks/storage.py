"""`python -m benchmarks.storage`: bytes, speed, memory and growth of our datasets beside what else one would write.

Both sides run here, on the same rows, which are real rollouts. benchmarks/README.md says how each figure is taken.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from benchmarks.growth import grow
from benchmarks.layouts import LAYOUTS, LEAVES
from benchmarks.machine import processor
from benchmarks.measure import Source, memory, speed, stored_bytes, tokens_of, topk_bytes
from benchmarks.rollouts import scored_rollouts
from benchmarks.s3 import s3_server
from benchmarks.tables import Row, say_tables
from common.cli import run
from common.dataset import open_dataset, require_kind

ROOT = Path("runs/bench")
TIMES = (1, 4, 16)
"""How many times larger the datasets get on which memory is measured."""
TIMED = 4
"""A timing takes this many times `--tokens` tokens."""
S3_SHARDS = 10_000
"""At most so many on S3: putting the objects there takes longer than all that is measured."""


@click.command()
@click.option("--data", help="A scored dataset to measure on; without it one is made in runs/bench, in ten minutes.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write machine, data and rows here.")
@click.option("--tokens", default=500_000, show_default=True, help="Completion tokens of the memory table's smallest.")
@click.option("--shards", default=(10, 1_000, 100_000), show_default=True, multiple=True, help="Sizes to grow to.")
def storage(data: str | None, json_file: Path | None, tokens: int, shards: tuple[int, ...]) -> None:
    """Measure, print the tables, and say which goals are reached."""
    root = ROOT.absolute()
    root.mkdir(parents=True, exist_ok=True)
    url = data or scored_rollouts(root)
    require_kind(open_dataset(url), "scored")
    with TemporaryDirectory(dir=root, prefix="scratch-") as scratch:
        source = Source(url, Path(scratch))
        found = {"benchmark": "storage", "machine": _machine(), "data": _about(url), "rows": []}
        parts = [*_of_layouts(source, tokens), *_of_growth(source, shards)]
        for number, (label, measure_part) in enumerate(parts, 1):
            click.echo(f"[{number}/{len(parts)}] {label}", err=True)
            found["rows"] += measure_part()
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(found, indent=1) + "\n")
        say_tables(found)


Part = tuple[str, Callable[[], list[Row]]]
"""One stretch of measuring: what it measures, and what finds its rows."""


def _of_layouts(source: Source, tokens: int) -> Iterator[Part]:
    for name in LAYOUTS:
        yield f"bytes: {name}", lambda name=name: [_bytes_row(source, name)]
    yield "bytes: the top-k", lambda: _topk_rows(source)
    for name in LAYOUTS:
        yield f"speed: {name}", lambda name=name: [_speed_row(source, name, tokens)]
    for times in TIMES:
        for name in LAYOUTS:
            yield f"memory x{times}: {name}", lambda name=name, times=times: [_memory_row(source, name, tokens, times)]
        yield (
            f"memory x{times}: ours, all in one shard",
            lambda times=times: [_memory_row(source, "ours", tokens, times, one_shard=True)],
        )


def _of_growth(source: Source, shards: tuple[int, ...]) -> Iterator[Part]:
    for count in shards:
        folder = source.scratch / f"grown-{count}"
        yield (
            f"growth: {count:,} shards in a folder",
            lambda folder=folder, count=count: _growth_rows(source, "folder", str(folder), count),
        )
    some = sorted({min(count, S3_SHARDS) for count in shards})
    yield f"growth: {', '.join(f'{count:,}' for count in some)} shards on S3", lambda: _growth_on_s3(source, some)


def _bytes_row(source: Source, name: str) -> Row:
    stored, tokens = stored_bytes(source, name), tokens_of(source.rows())
    columns = {leaf: stored[leaf] / tokens for leaf in LEAVES}
    row = {"table": "bytes", "layout": name, "tokens": tokens, "total": stored["total"] / tokens}
    return {**row, **columns, "ids_and_logprobs": sum(columns.values())}


def _topk_rows(source: Source) -> list[Row]:
    stored, tokens = topk_bytes(source), tokens_of(source.rows())
    if not stored:
        return []
    ids, logprobs = (stored[f"teacher_topk_{kind}"] / tokens for kind in ("ids", "logprobs"))
    return [{"table": "topk", "k": open_dataset(source.url).topk, "ids": ids, "logprobs": logprobs}]


def _speed_row(source: Source, name: str, tokens: int) -> Row:
    held = tokens_of(source.rows())
    passes = math.ceil(TIMED * tokens / held)
    write, read = (passes * held / seconds for seconds in speed(source, name, passes))
    row = {"table": "speed", "layout": name, "tokens": passes * held}
    return {**row, "write_tokens_per_cpu_second": write, "read_tokens_per_cpu_second": read}


def _memory_row(source: Source, name: str, tokens: int, times: int, *, one_shard: bool = False) -> Row:
    write, read = memory(source, name, tokens, times, one_shard=one_shard)
    row = {"table": "memory", "layout": name, "one_shard": one_shard, "times": times, "tokens": times * tokens}
    return {**row, "write_peak_bytes": write, "read_peak_bytes": read}


def _growth_on_s3(source: Source, shards: list[int]) -> list[Row]:
    with s3_server(source.folder("s3")) as bucket:
        return [row for count in shards for row in _growth_rows(source, "S3", f"{bucket}/grown-{count}", count)]


def _growth_rows(source: Source, store: str, url: str, shards: int) -> list[Row]:
    row = {"table": "growth", "store": store, "shards": shards}
    return [
        {**row, "step": step, "seconds": cost.seconds, "cpu_seconds": cost.cpu_seconds, "peak_bytes": cost.peak_bytes}
        for step, cost in grow(url, source.plan(shards), shards)
    ]


def _machine() -> dict[str, Any]:
    packages = {name: version(name) for name in ("pyarrow", "pandas", "numpy", "s3fs", "pydantic")}
    return {**processor(), "load": os.getloadavg()[0], **packages}


def _about(url: str) -> dict[str, Any]:
    dataset = open_dataset(url)
    return {
        "url": url,
        "manifest_sha256": dataset.manifest_sha256,
        "policy": Path(dataset.plan["policy"]["name"]).name,
        "rows": dataset.num_rows,
        "tokens": dataset.num_tokens,
        "tokens_per_row": dataset.num_tokens / dataset.num_rows,
    }


if __name__ == "__main__":
    run(storage)
