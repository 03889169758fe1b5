"""How one writes a dataset without thinking of failures: stream each file to where it belongs; what is there is done.

It is here to be caught: a harness that finds nothing wrong with it would prove nothing about ours.
"""

import random
import time
from collections.abc import Callable, Mapping

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from common.schema import arrow_schema, to_table
from tests.chaos.content import ROWS, Round


def write(place: Round, tag: int, pace: float) -> str:
    """Stream every shard that is not there yet, `pace` seconds a shard; there is no pin."""
    fs, root = fsspec.url_to_fs(place.url)
    there = set(fs.find(root))
    left = [shard for shard in range(place.shards) if f"{root}/{_key(shard)}" not in there]
    for shard in random.sample(left, len(left)):
        with fs.open(f"{root}/{_key(shard)}", "wb") as file, pq.ParquetWriter(file, arrow_schema()) as parquet:
            for row in place.rows(shard, tag):
                time.sleep(pace / ROWS)
                parquet.write_table(to_table([row]))
    return ""


def reader(place: Round) -> tuple[str, Callable[[int], pa.Table]]:
    """What reads a shard; there is no pin."""

    def read(shard: int) -> pa.Table:
        with fsspec.open(f"{place.url}/{_key(shard)}", "rb") as file:
            return pq.read_table(file)

    return "", read


def pin(objects: Mapping[str, bytes]) -> str:
    """There is none."""
    return ""


def committed(objects: Mapping[str, bytes]) -> list[tuple[int, str]]:
    """Shard and object: what is there is done."""
    return [(int(name[len("data/") :].split(".")[0]), name) for name in sorted(objects)]


def _key(shard: int) -> str:
    return f"data/{shard:06d}.parquet"
