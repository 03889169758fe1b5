"""The dataset of `common`, as the workers of a job write it and as a trainer reads it."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping

import pyarrow as pa

from common.dataset import open_dataset
from common.dataset_writer import create_dataset
from common.schema import to_table
from tests.chaos.content import ROWS, Round


def write(place: Round, tag: int, pace: float) -> str:
    """Work on the dataset until it is finished, `pace` seconds a shard; returns the pin of what was finished."""
    writer = create_dataset(place.url, place.plan())
    for shard in writer.shards_left():
        rows = []
        for row in place.rows(shard, tag):
            time.sleep(pace / ROWS)
            rows.append(row)
        writer.commit(shard, to_table(rows), {"tag": float(tag)})
    return writer.finalize()


def reader(place: Round) -> tuple[str, Callable[[int], pa.Table]]:
    """The pin of a finished dataset and what reads a shard of it, in one of the two ways."""
    dataset = open_dataset(place.url)

    def read(shard: int) -> pa.Table:
        return pa.concat_tables(dataset.iter_row_groups(shard)) if shard % 2 else dataset.read_shard(shard)

    return dataset.manifest_sha256, read


def pin(objects: Mapping[str, bytes]) -> str:
    """What every worker and reader must have called the dataset that these objects are."""
    return hashlib.sha256(objects.get("MANIFEST.json", b"")).hexdigest()


def committed(objects: Mapping[str, bytes]) -> list[tuple[int, str]]:
    """Shard and object of every commit that a reader would believe, from the bare objects of a dataset."""
    manifest = objects.get("MANIFEST.json")
    if manifest is None:
        return []
    records = json.loads(manifest)["shards"]
    commits = [json.loads(data) for name, data in sorted(objects.items()) if name.startswith("commits/")]
    for commit in commits:
        del commit["seal"]
    if records != commits:
        return []
    return [(record["shard"], record["file"]) for record in records if _intact(record, objects)]


def _intact(record: Mapping[str, str], objects: Mapping[str, bytes]) -> bool:
    """Whether the object that a commit names is there, whole."""
    return hashlib.sha256(objects.get(record["file"], b"")).hexdigest() == record["sha256"]
