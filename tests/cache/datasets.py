"""Datasets made up for the tests of `lopd cache`, and the command itself, run in this process."""

import contextlib
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pytest

from common import cli
from common.canonical import seal, sha256, unseal
from common.dataset_writer import DatasetWriter, create_dataset
from common.parquet import announced, encode
from common.records import commit_key, data_key
from common.storage import Store
from tests.common.rows import make_plan, make_table


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit code and what it wrote."""

    code: int | str | None
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its one JSON value."""
        return json.loads(self.out)


def lopd(*arguments: str) -> Ran:
    """Run `lopd <arguments>` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as raised,
    ):
        cli.run(cli.group, list(arguments))
    return Ran(raised.value.code, out.getvalue(), err.getvalue())


def make_dataset(
    url: str,
    shards: int = 3,
    *,
    committed: Iterable[int] | None = None,
    finish: bool = True,
    table: Callable[[int], pa.Table] | None = None,
    **plan: Any,
) -> DatasetWriter:
    """A dataset at `url`; unfinished when not all shards are `committed`, or `finish` is False.

    Args:
        table: the table of a shard; one of three rows unless given.
        plan: goes over the plan of `make_plan`.
    """
    made = make_plan(shards, **plan)
    writer = create_dataset(url, made)
    done = [*range(shards)] if committed is None else [*committed]
    for shard in done:
        default = make_table(rows=3, first=10 * shard, topk=made["topk"], scored=made["kind"] == "scored")
        writer.commit(shard, table(shard) if table else default)
    if finish and len(done) == shards:
        writer.finalize()
    return writer


def orphan(store: Store, shard: int, data: bytes = b"the work of a worker that was killed") -> str:
    """Put a data object that no commit names; returns its name."""
    name = data_key(shard, sha256(data))
    store.put(name, data)
    return name


def plant(store: Store, shard: int, table: pa.Table | bytes, **said: Any) -> None:
    """Commit a table, or the bytes of one, past all checks; `said` goes over what its commit says."""
    data = table if isinstance(table, bytes) else encode(table)
    digest = sha256(data)
    commit = {"shard": shard, "file": data_key(shard, digest), "sha256": digest, "bytes": len(data), "stats": {}}
    if isinstance(table, pa.Table):
        told = announced(table)
        commit |= {"rows": told.rows, "prompt_tokens": told.prompt_tokens, "tokens": told.tokens}
    store.put(str(commit["file"]), data)
    store.put(commit_key(shard), seal(commit | said))


def flip(store: Store, key: str, position: int = -20) -> None:
    """Flip one bit of an object."""
    data = bytearray(store.get(key))
    data[position] ^= 1
    store.put(key, bytes(data))


def reseal(store: Store, key: str, **changes: Any) -> None:
    """Change a record and seal it again, as somebody does who wants to deceive, or a bug."""
    record = unseal(store.get(key), key)
    store.put(key, seal(record | changes))


def names(store: Store) -> set[str]:
    """Every object there."""
    return {entry.name for entry in store.list()}
