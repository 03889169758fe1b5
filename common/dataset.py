"""A dataset on object storage: plan -> shards -> commits -> manifest.

    plan.json                      create-only: every input that changes bytes; its content's hash is the dataset's id
    data/<shard>-<sha16>.parquet   content-addressed, so an orphan of a dead worker harms nobody
    commits/<shard>.json           create-only: THE commit of a shard; the first one wins, a loser takes it over
    README.md                      the dataset card, written before the manifest
    MANIFEST.json                  create-only, deterministic: THE only thing that makes the dataset readable

Any number of workers may run one plan; each lists `commits/` afresh to see what is left.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from common import schema
from common.canonical import canonical, parse_object, parse_record, sha256
from common.card import dataset_card
from common.errors import DataError, LopdError, StorageError, UsageError
from common.plans import REBUILD, Commit, Manifest, Plan, another_plan, check_manifest, content, dataset_id
from common.storage import AlreadyExists, NotFound, Store, cache_dir, is_url

PLAN, MANIFEST, CARD = "plan.json", "MANIFEST.json", "README.md"


@dataclass(frozen=True)
class RowLengths:
    """Where every row lies and how long it is; one entry a row, in dataset order."""

    shard: np.ndarray  # (rows,) int32
    row: np.ndarray  # (rows,) int32, index within the shard
    prompt: np.ndarray  # (rows,) int32 tokens
    completion: np.ndarray  # (rows,) int32 tokens


class DatasetWriter:
    """A dataset being made. Safe to hold in many workers at once."""

    def __init__(self, store: Store, plan: Plan) -> None:
        self.store, self.plan, self.url = store, plan, store.url

    def pending(self) -> list[int]:
        """Shards without a commit, by a fresh listing."""
        done = {entry.name for entry in self.store.list("commits")}
        return [shard for shard in range(self.plan["shards"]) if _commit_key(shard) not in done]

    def commit(self, shard: int, table: pa.Table, stats: Mapping[str, float] | None = None) -> Commit:
        """Check, store and commit one shard; returns the commit that holds, which may be another worker's.

        Raises:
            DataError: the table breaks the contract; nothing was written.
        """
        where = f"{self.url}, shard {shard}"
        scored = self.plan["kind"] == "scored"
        schema.check_table(table, vocab_size=self.plan["vocab_size"], scored=scored, where=where)
        if schema.topk_of(table.schema) != self.plan["topk"]:
            raise DataError(f"top-k of {schema.topk_of(table.schema)}, the plan says {self.plan['topk']}", where=where)
        data = schema.encode(table)
        digest = sha256(data)
        commit = Commit(
            shard=shard,
            file=f"data/{shard:06d}-{digest[:16]}.parquet",
            sha256=digest,
            bytes=len(data),
            rows=len(table),
            prompt_tokens=_token_count(table, "prompt_ids"),
            tokens=_token_count(table, "completion_ids"),
            stats=dict(stats or {}),
        )
        self.store.put(commit.file, data)
        try:
            self.store.put_new(_commit_key(shard), canonical(commit.model_dump()))
        except AlreadyExists:
            return self._read_commit(shard)
        return commit

    def finalize(self) -> str:
        """Write card and manifest once every shard is committed; returns the manifest's sha256.

        Deterministic: any worker that calls it writes the same bytes, so all of them succeed.
        """
        missing = self.pending()
        if missing:
            raise DataError(f"{len(missing)} of {self.plan['shards']} shards are not committed yet", where=self.url)
        commits = [self._read_commit(shard) for shard in range(self.plan["shards"])]
        stored = {entry.name: entry.size for entry in self.store.list("data")}
        for commit in commits:
            if stored.get(commit.file) != commit.bytes:
                raise DataError("a committed object is missing or has another size", where=f"{self.url}/{commit.file}")
        manifest = Manifest(
            schema_version=schema.SCHEMA_VERSION,
            dataset_id=dataset_id(self.plan),
            plan_sha256=sha256(self.store.get(PLAN)),
            kind=self.plan["kind"],
            overrides=tuple(self.plan["overrides"]),
            rows=sum(commit.rows for commit in commits),
            prompt_tokens=sum(commit.prompt_tokens for commit in commits),
            tokens=sum(commit.tokens for commit in commits),
            shards=tuple(commits),
        )
        data = canonical(manifest.model_dump())
        self.store.put(CARD, dataset_card(self.plan, manifest.model_dump()).encode())
        self.store.put_new(MANIFEST, data)
        return sha256(data)

    def _read_commit(self, shard: int) -> Commit:
        key = _commit_key(shard)
        return parse_record(Commit, self.store.get(key), f"{self.url}/{key}", REBUILD)


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
        self.manifest: dict[str, Any] = manifest.model_dump()

    def read_shard(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One shard, its hash, page checksums and rows checked.

        Args:
            columns: read only these; the row checks then cover lengths of what is read no more, the hash still does.

        Raises:
            DataError: the object is missing, altered, or holds rows that break the contract.
        """
        commit = self.shards[shard]
        where = f"{self.url}/{commit.file}"
        try:
            table = schema.decode(self._shard_bytes(commit), columns)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"the shard is not readable Parquet: {error}", where=where) from None
        if len(table) != commit.rows:
            raise DataError(f"the shard holds {len(table)} rows, its commit says {commit.rows}", where=where)
        if columns is None:
            schema.check_table(table, vocab_size=self.vocab_size, scored=self.kind == "scored", where=where)
        return table

    def row_lengths(self) -> RowLengths:
        """Lengths of all rows; reads every shard once."""
        parts = []
        for shard in range(self.num_shards):
            table = self.read_shard(shard, columns=["prompt_ids", "completion_ids"])
            prompt, completion = (
                np.diff(table[name].combine_chunks().offsets.to_numpy()).astype(np.int32) for name in table.column_names
            )
            rows = len(prompt)
            parts.append((np.full(rows, shard, np.int32), np.arange(rows, dtype=np.int32), prompt, completion))
        return RowLengths(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _shard_bytes(self, commit: Commit) -> bytes:
        """The object's bytes, from the local cache when it holds them; one re-read before an altered one is refused."""
        cached = cache_dir() / "shards" / f"{commit.sha256}.parquet" if is_url(self.url) else None
        if cached is not None and cached.exists():
            data = cached.read_bytes()
            if sha256(data) == commit.sha256:
                return data
        for _ in range(2):
            try:
                data = self.store.get(commit.file)
            except NotFound:
                raise DataError("a shard is missing", where=f"{self.url}/{commit.file}", fix=REBUILD) from None
            if sha256(data) == commit.sha256:
                if cached is not None:
                    _keep(cached, data)
                return data
        raise DataError("a shard was altered: its sha256 differs", where=f"{self.url}/{commit.file}", fix=REBUILD)


def create_dataset(url: str, plan: Plan) -> DatasetWriter:
    """Start a dataset at `url`, or join the one that is being made there by a plan of the same content.

    Raises:
        DataError: another plan lies there; the message names the keys that differ.
        StorageError: the store ignores create-only writes.
    """
    store = Store(url)
    store.require_create_only()
    try:
        store.put_new(PLAN, canonical(plan))
    except AlreadyExists:
        theirs = _read_plan(store)
        if content(theirs) != content(plan):
            raise another_plan(theirs, plan, store.url) from None
        return DatasetWriter(store, theirs)
    return DatasetWriter(store, plan)


def is_finished(url: str) -> bool:
    """Whether a dataset at `url` has its manifest."""
    return Store(url).exists(MANIFEST)


def open_dataset(url: str) -> Dataset:
    """Open a finished dataset.

    Raises:
        DataError: there is none, it is not finished, it was altered or another version of the schema wrote it.
    """
    store = Store(url)
    try:
        data = store.get(MANIFEST)
    except NotFound:
        raise _no_manifest(store) from None
    where = f"{store.url}/{MANIFEST}"
    version = parse_object(data, where, REBUILD).get("schema_version")
    if version != schema.SCHEMA_VERSION:
        raise DataError(
            f"the dataset has schema version {version}, this software reads version {schema.SCHEMA_VERSION}",
            where=where,
            fix="Use the release that wrote it",
        )
    manifest = parse_record(Manifest, data, where, REBUILD)
    plan_bytes = store.get(PLAN)
    if sha256(plan_bytes) != manifest.plan_sha256:
        raise DataError("plan.json is not the plan of this manifest", where=store.url, fix=REBUILD)
    plan = parse_object(plan_bytes, f"{store.url}/{PLAN}", REBUILD)
    check_manifest(manifest, plan, where)
    return Dataset(store, plan, manifest, sha256(data))


def _read_plan(store: Store) -> Plan:
    return parse_object(store.get(PLAN), f"{store.url}/{PLAN}", REBUILD)


def _no_manifest(store: Store) -> LopdError:
    try:
        plan = _read_plan(store)
    except NotFound:
        return DataError("there is no dataset here", where=store.url, fix="Check the URL, or run `lopd precompute`")
    done = len(store.list("commits"))
    return DataError(
        f"the dataset is not finished: {done} of {plan.get('shards', '?')} shards are committed",
        where=store.url,
        fix="Run the same `lopd precompute` command again: it resumes",
    )


def _keep(cached: Path, data: bytes) -> None:
    """Keep a verified shard; a full disk costs the copy, not the read."""
    with suppress(StorageError):
        Store(str(cached.parent)).put(cached.name, data)


def _commit_key(shard: int) -> str:
    return f"commits/{shard:06d}.json"


def _token_count(table: pa.Table, name: str) -> int:
    return int(np.diff(table[name].combine_chunks().offsets.to_numpy()).sum())


def require_kind(dataset: Dataset, kind: str) -> None:
    """Refuse a dataset of another kind, saying how to get the right one."""
    made_by = {"sft": "sft-data", "rollouts": "rollouts", "scored": "score"}[kind]
    if dataset.kind != kind:
        raise UsageError(
            f"this is a dataset of kind {dataset.kind!r}, {kind!r} is needed",
            where=dataset.url,
            fix=f"`lopd precompute {made_by}` makes one",
        )
