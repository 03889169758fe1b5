"""A dataset on object storage: plan -> shards -> commits -> manifest.

    plan.json                      create-only: every input that changes bytes; its hash is the dataset's id
    data/<shard>-<sha16>.parquet   content-addressed, so an orphan of a dead worker harms nobody
    commits/<shard>.json           create-only: THE commit of a shard; the first one wins, a loser takes it over
    README.md                      the dataset card, written before the manifest
    MANIFEST.json                  create-only, deterministic: THE only thing that makes the dataset readable

Any number of workers may run one plan; each lists `commits/` afresh to see what is left.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from common import schema
from common.card import dataset_card
from common.config import Frozen
from common.errors import DataError, LopdError, StorageError, UsageError
from common.storage import AlreadyExists, NotFound, Store, cache_dir

PLAN, MANIFEST, CARD = "plan.json", "MANIFEST.json", "README.md"
DATA_FILE = re.compile(r"data/\d{6}-[0-9a-f]{16}\.parquet")
KINDS = ("sft", "rollouts", "scored")
Plan = dict[str, Any]
"""Inputs that change bytes. Every plan has kind, schema_version, shards, prompts_per_shard, vocab_size, topk, policy,
lineage, teacher, sampling, template, prompts, parent and overrides; `precompute.plan` builds them."""


class Commit(Frozen):
    """One shard, committed: what the object must be for a reader to accept it."""

    shard: int
    file: str
    sha256: str
    bytes: int
    rows: int
    prompt_tokens: int
    tokens: int
    stats: dict[str, float]


class Manifest(Frozen):
    """All shards of a finished dataset."""

    schema_version: int
    dataset_id: str
    plan_sha256: str
    kind: str
    overrides: tuple[str, ...]
    rows: int
    prompt_tokens: int
    tokens: int
    shards: tuple[Commit, ...]


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
        digest = hashlib.sha256(data).hexdigest()
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
            self.store.put_new(_commit_key(shard), _canonical(commit.model_dump()))
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
            plan_sha256=_sha256(_canonical(self.plan)),
            kind=self.plan["kind"],
            overrides=tuple(self.plan["overrides"]),
            rows=sum(commit.rows for commit in commits),
            prompt_tokens=sum(commit.prompt_tokens for commit in commits),
            tokens=sum(commit.tokens for commit in commits),
            shards=tuple(commits),
        )
        data = _canonical(manifest.model_dump())
        self.store.put(CARD, dataset_card(self.plan, manifest.model_dump()).encode())
        self.store.put_new(MANIFEST, data)
        return _sha256(data)

    def _read_commit(self, shard: int) -> Commit:
        key = _commit_key(shard)
        return _parse(Commit, self.store.get(key), f"{self.url}/{key}")


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
        cached = cache_dir() / "shards" / f"{commit.sha256}.parquet" if "://" in self.url else None
        if cached is not None and cached.exists():
            data = cached.read_bytes()
            if _sha256(data) == commit.sha256:
                return data
        for _ in range(2):
            try:
                data = self.store.get(commit.file)
            except NotFound:
                raise DataError("a shard is missing", where=f"{self.url}/{commit.file}", fix=_REBUILD) from None
            if _sha256(data) == commit.sha256:
                if cached is not None:
                    _keep(cached, data)
                return data
        raise DataError("a shard was altered: its sha256 differs", where=f"{self.url}/{commit.file}", fix=_REBUILD)


_REBUILD = "Copy the dataset again, or make it anew at another URL"


def dataset_id(plan: Plan) -> str:
    """First 16 hex digits of the sha256 of the canonical plan."""
    return _sha256(_canonical(plan))[:16]


def create_dataset(url: str, plan: Plan) -> DatasetWriter:
    """Start a dataset at `url`, or join the one that is being made there by the same plan.

    Raises:
        DataError: another plan lies there; the message names the keys that differ.
    """
    store = Store(url)
    try:
        store.put_new(PLAN, _canonical(plan))
    except AlreadyExists:
        raise _another_plan(_parse_json(store.get(PLAN), f"{store.url}/{PLAN}"), plan, store.url) from None
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
    version = _parse_json(data, where).get("schema_version")
    if version != schema.SCHEMA_VERSION:
        raise DataError(
            f"the dataset has schema version {version}, this software reads version {schema.SCHEMA_VERSION}",
            where=where,
            fix="Use the release that wrote it",
        )
    manifest = _parse(Manifest, data, where)
    plan_bytes = store.get(PLAN)
    if _sha256(plan_bytes) != manifest.plan_sha256:
        raise DataError("plan.json is not the plan of this manifest", where=store.url, fix=_REBUILD)
    plan = _parse_json(plan_bytes, f"{store.url}/{PLAN}")
    _check_manifest(manifest, plan, where)
    return Dataset(store, plan, manifest, _sha256(data))


def _check_manifest(manifest: Manifest, plan: Plan, where: str) -> None:
    if len(manifest.shards) != plan["shards"]:
        raise DataError(f"{len(manifest.shards)} shards, the plan has {plan['shards']}", where=where, fix=_REBUILD)
    if manifest.kind not in KINDS:
        raise DataError(f"unknown kind of dataset {manifest.kind!r}", where=where)
    for index, commit in enumerate(manifest.shards):
        if commit.shard != index:
            raise DataError(f"shard {index} is not in its place", where=where)
        if not DATA_FILE.fullmatch(commit.file):
            raise DataError(f"not a path of a shard: {commit.file!r}", where=where, fix="Do not trust this dataset")
    if manifest.rows != sum(commit.rows for commit in manifest.shards):
        raise DataError("the row counts do not add up", where=where)


def _no_manifest(store: Store) -> LopdError:
    try:
        plan = _parse_json(store.get(PLAN), f"{store.url}/{PLAN}")
    except NotFound:
        return DataError("there is no dataset here", where=store.url, fix="Check the URL, or run `lopd precompute`")
    done = len(store.list("commits"))
    return DataError(
        f"the dataset is not finished: {done} of {plan.get('shards', '?')} shards are committed",
        where=store.url,
        fix="Run the same `lopd precompute` command again: it resumes",
    )


def _another_plan(theirs: Plan, ours: Plan, url: str) -> DataError:
    rows = [
        f"  {key:<32} {str(_at(theirs, key)):<44} {_at(ours, key)}"
        for key in sorted({*_leaves(theirs), *_leaves(ours)})
        if _at(theirs, key) != _at(ours, key)
    ]
    keys = ", ".join(row.split()[0] for row in rows)
    return DataError(
        f"another plan lies here; it differs in {keys}",
        where=url,
        fix="Give back the old settings to resume it, or choose another CACHE",
        detail="\n".join([f"  {'key':<32} {'there':<44} here", *rows]),
    )


def _leaves(plan: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in plan.items():
        keys += _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [f"{prefix}{name}"]
    return keys


def _at(plan: Any, key: str) -> Any:
    for name in key.split("."):
        plan = plan.get(name) if isinstance(plan, Mapping) else None
    return plan


def _keep(cached: Path, data: bytes) -> None:
    """Keep a verified shard; a full disk costs the copy, not the read."""
    with suppress(StorageError):
        Store(str(cached.parent)).put(cached.name, data)


def _commit_key(shard: int) -> str:
    return f"commits/{shard:06d}.json"


def _token_count(table: pa.Table, name: str) -> int:
    return int(np.diff(table[name].combine_chunks().offsets.to_numpy()).sum())


def _canonical(value: Mapping[str, Any]) -> bytes:
    """One byte string per value: sorted keys, no spare blanks, UTF-8."""
    return (
        json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"
    ).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _parse_json(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"not valid JSON: {error}", where=where, fix=_REBUILD) from None
    if not isinstance(value, dict):
        raise DataError("not a JSON object", where=where, fix=_REBUILD)
    return value


def _parse(model: type[Any], data: bytes, where: str) -> Any:
    try:
        return model.model_validate(_parse_json(data, where))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{key}: {first['msg']}", where=where, fix=_REBUILD) from None


def require_kind(dataset: Dataset, kind: str) -> None:
    """Refuse a dataset of another kind, saying how to get the right one."""
    made_by = {"sft": "sft-data", "rollouts": "rollouts", "scored": "score"}[kind]
    if dataset.kind != kind:
        raise UsageError(
            f"this is a dataset of kind {dataset.kind!r}, {kind!r} is needed",
            where=dataset.url,
            fix=f"`lopd precompute {made_by}` makes one",
        )
