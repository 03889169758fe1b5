"""A dataset on object storage, opened for reading: plan -> shards -> commits -> manifest.

    plan.json                      create-only: every input that changes bytes; its content's hash is the dataset's id
    data/<shard>-<sha16>.parquet   content-addressed, so an orphan of a dead worker harms nobody
    commits/<shard>.json           create-only: THE commit of a shard; the first one wins, a loser takes it over
    README.md                      the dataset card, written before the manifest
    MANIFEST.json                  create-only, deterministic: THE only thing that makes the dataset readable

`dataset_writer` makes one, `records` reads the JSON, `schema` says what a row is and `parquet` how it is stored.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import pyarrow as pa

from common import parquet
from common.canonical import sha256
from common.errors import DataError, LopdError, UsageError
from common.lengths import LENGTH_COLUMNS, RowLengths, joined, keep_lengths, kept_lengths, lengths_in
from common.parquet_limits import Announced
from common.plans import Plan
from common.progress import followed
from common.records import MANIFEST, READS, REBUILD, Commit, Manifest, committed_shards, read_manifest, read_plan
from common.schema import check_table, widths_in
from common.shard_cache import cached_shard, keep_shard
from common.storage import NotFound, Store
from common.urls import is_url

LENGTH_READERS = 8
"""Shards read at the same time for their lengths; each is in memory meanwhile."""


class Dataset:
    """A finished dataset, pinned by the hash of its manifest. Every read is verified."""

    def __init__(self, store: Store, plan: Plan, manifest: Manifest, manifest_sha256: str) -> None:
        self.store, self.plan, self._manifest, self.manifest_sha256 = store, plan, manifest, manifest_sha256
        self.url = store.url
        self.kind: str = manifest.kind
        self.topk: int = plan["topk"]
        self.vocab_size: int = plan["vocab_size"]
        self.shards = manifest.shards
        self.num_shards = len(manifest.shards)
        self.num_rows = manifest.rows
        self.num_tokens = manifest.tokens

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest as plain values."""
        return self._manifest.model_dump()

    def read_shard(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One shard, its hash, page checksums and rows checked.

        Args:
            columns: read only these; the row checks then cover lengths of what is read no more, the hash still does.

        Raises:
            DataError: the object is missing, altered, or holds rows that break the contract.
        """
        commit = self.shards[shard]
        where = f"{self.url}/{commit.file}"
        table = parquet.decode(self._shard_bytes(commit), self._announced(commit), where, columns)
        if columns is None:
            self._check(table, where)
        return table

    def iter_row_groups(self, shard: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The same rows and checks as `read_shard`, with one row group decoded at a time."""
        commit = self.shards[shard]
        where = f"{self.url}/{commit.file}"
        uids: set[str] = set()
        for table in parquet.iter_row_groups(self._shard_bytes(commit), self._announced(commit), where, columns):
            if columns is None:
                self._check(table, where)
                before = len(uids)
                uids.update(table["uid"].to_pylist())
                if len(uids) - before != len(table):
                    raise DataError("a uid stands twice", where=where)
            yield table

    def row_lengths(self) -> RowLengths:
        """Lengths of all rows: from the local cache, or from one reading of every shard, said if it lasts."""
        remote = is_url(self.url)
        if remote and (kept := kept_lengths(self.manifest_sha256, self.shards)) is not None:
            return kept
        with ThreadPoolExecutor(LENGTH_READERS, thread_name_prefix="lengths") as threads:
            parts = threads.map(self._shard_lengths, range(self.num_shards))
            lengths = joined(list(followed(parts, f"reading lengths of {self.url}", self.num_shards, "shards")))
        if remote:
            keep_lengths(self.manifest_sha256, lengths)
        return lengths

    def _shard_lengths(self, shard: int) -> RowLengths:
        return lengths_in(shard, self.read_shard(shard, columns=LENGTH_COLUMNS))

    def _announced(self, commit: Commit) -> Announced:
        return Announced(commit.rows, commit.prompt_tokens, commit.tokens, *widths_in(self.plan))

    def _check(self, table: pa.Table, where: str) -> None:
        check_table(table, vocab_size=self.vocab_size, scored=self.kind == "scored", where=where)

    def _shard_bytes(self, commit: Commit) -> bytes:
        """The object's bytes, from the local cache when it holds them."""
        remote = is_url(self.url)
        if remote and (data := cached_shard(commit.sha256)) is not None:
            return data
        data = shard_bytes(self.store, commit)
        if remote:
            keep_shard(commit.sha256, data)
        return data


def shard_bytes(store: Store, commit: Commit) -> bytes:
    """The object of a commit, downloaded whatever a cache holds, and read again before it is called altered.

    Raises:
        DataError: it is missing, of another size, or altered.
    """
    where = f"{store.url}/{commit.file}"
    for _ in range(READS):
        try:
            data = store.get(commit.file, at_most=commit.bytes)
        except NotFound:
            raise DataError("the shard is missing", where=where, fix=REBUILD) from None
        if sha256(data) == commit.sha256:
            return data
    raise DataError("the shard was altered: its sha256 differs", where=where, fix=REBUILD)


def is_finished(url: str) -> bool:
    """Whether a dataset at `url` has its manifest."""
    return Store(url).exists(MANIFEST)


def open_dataset(url: str, manifest_sha256: str | None = None) -> Dataset:
    """Open a finished dataset.

    Args:
        manifest_sha256: pins it: any other dataset is refused.

    Raises:
        DataError: there is none, it is not finished, it was altered, another version of the schema wrote it, or it is
            not the one that is pinned.
    """
    store = Store(url)
    try:
        manifest, plan, digest = read_manifest(store)
    except NotFound:
        raise _no_manifest(store) from None
    if manifest_sha256 not in (None, digest):
        raise DataError(
            f"another dataset lies here: its manifest has sha256 {digest}, not {manifest_sha256}",
            where=store.url,
            fix="Find the one that is pinned, or pin this one",
        )
    return Dataset(store, plan, manifest, digest)


def _no_manifest(store: Store) -> LopdError:
    try:
        plan = read_plan(store)
    except NotFound:
        return DataError("there is no dataset here", where=store.url, fix="Check the URL, or run `lopd precompute`")
    done = len(committed_shards(store))
    return DataError(
        f"the dataset is not finished: {done} of {plan['shards']} shards are committed",
        where=store.url,
        fix="Run the same command again (`lopd precompute`, or `lopd cache copy`): it resumes",
    )


def require_kind(dataset: Dataset, kind: str) -> None:
    """Refuse a dataset of another kind, saying how to get the right one."""
    made_by = {"sft": "sft-data", "rollouts": "rollouts", "scored": "score"}[kind]
    if dataset.kind != kind:
        raise UsageError(
            f"this is a dataset of kind {dataset.kind!r}, {kind!r} is needed",
            where=dataset.url,
            fix=f"`lopd precompute {made_by}` makes one",
        )
