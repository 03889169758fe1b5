"""What it costs to start, join, resume, finish and open a dataset as it grows: lists and records, no shard is read.

The records are real: sealed, complete, of a real plan. The shards they name hold a few bytes each.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec

from benchmarks.cost import Cost, in_fresh_process, measured
from common.canonical import seal, sha256
from common.dataset import is_finished, open_dataset
from common.dataset_writer import create_dataset
from common.errors import DataError
from common.records import Commit, commit_key, data_key
from common.urls import is_url

BATCH = 2000
"""Objects handed to the filesystem at once."""


def grow(url: str, plan: Mapping[str, Any], shards: int) -> Iterator[tuple[str, Cost]]:
    """Make a dataset of `shards` shards at `url`, where nothing is; every step by name, measured in its own process.

    `plan` begins it, `join` is a second worker's way in, `resume` lists what is left when all but one shard are
    committed, `finish` reads every commit and writes the manifest, `open` is a reader's way in.
    """
    plan = {**plan, "shards": shards}
    yield ("plan", in_fresh_process(_create, url, plan))
    _commit(url, range(1, shards))
    yield ("join", in_fresh_process(_create, url, plan))
    yield ("resume", in_fresh_process(_list_left, url, plan))
    _commit(url, range(1))
    yield ("finish", in_fresh_process(_finish, url, plan))
    yield ("open", in_fresh_process(_open, url, shards))


def _create(url: str, plan: dict[str, Any]) -> Cost:
    is_finished(url)  # imports and connects: a cost of every command, whatever the size
    with measured() as cost:
        create_dataset(url, plan)
    return cost


def _list_left(url: str, plan: dict[str, Any]) -> Cost:
    writer = create_dataset(url, plan)
    with measured() as cost:
        left = writer.pending()
    _require(left == [0], f"shards left: {left[:5]}", url)
    return cost


def _finish(url: str, plan: dict[str, Any]) -> Cost:
    writer = create_dataset(url, plan)
    with measured() as cost:
        writer.finalize()
    return cost


def _open(url: str, shards: int) -> Cost:
    is_finished(url)
    with measured() as cost:
        dataset = open_dataset(url)
    _require(dataset.num_shards == shards, f"{dataset.num_shards} shards", url)
    return cost


def _require(holds: bool, found: str, url: str) -> None:
    """A figure of something else than what it is said to be is worse than none."""
    if not holds:
        raise DataError(f"the benchmark measured another state: {found}", where=url)


def _commit(url: str, shards: range) -> None:
    """Store a shard of a few bytes, and the commit that names it, for each of `shards`."""
    for first in range(0, len(shards), BATCH):
        objects: dict[str, bytes] = {}
        for shard in shards[first : first + BATCH]:
            data = f"shard {shard}".encode()
            digest = sha256(data)
            commit = Commit(
                shard=shard,
                file=data_key(shard, digest),
                sha256=digest,
                bytes=len(data),
                rows=256,
                prompt_tokens=40_000,
                tokens=1_000_000,
                stats={"truncated": 3.0, "rollout_logprob_sum": -312345.67, "teacher_logprob_sum": -298765.43},
            )
            objects |= {commit.file: data, commit_key(shard): seal(commit.model_dump())}
        _put_many(url, objects)


def _put_many(url: str, objects: Mapping[str, bytes]) -> None:
    """Store them, without the care of `Store.put`, which would take longer than all that is measured."""
    if is_url(url):
        filesystem, root = fsspec.url_to_fs(url, use_listings_cache=False)
        filesystem.pipe({f"{root}/{key}": data for key, data in objects.items()})
        return
    for folder in ("data", "commits"):
        (Path(url) / folder).mkdir(exist_ok=True)
    for key, data in objects.items():
        (Path(url) / key).write_bytes(data)
