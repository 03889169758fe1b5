"""The records of a dataset, read from its store and checked: the plan, the commits, the manifest.

Each is sealed with its own hash, because nothing else would tell a flipped bit in a commit of a few hundred bytes from
another number of rows.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from getpass import getuser
from importlib.metadata import version
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from common import schema
from common.canonical import as_record, canonical, parse_object, sha256, unseal
from common.config import Frozen
from common.errors import DataError
from common.lineage import ModelIdentity, Provenance
from common.plans import Plan, dataset_id
from common.rejected import Rejected
from common.storage import NotFound, Store

PLAN, MANIFEST, CARD = "plan.json", "MANIFEST.json", "README.md"
Kind = Literal["sft", "rollouts", "scored"]
DATA_FILE = re.compile(r"data/[0-9]{6,}-[0-9a-f]{16}\.parquet")
COMMIT_FILE = re.compile(r"commits/([0-9]{6,8})\.json")
REBUILD = "Mend it with `lopd cache copy --repair` from a sound copy, or make it anew at another URL"
READS = 3
"""Times a record is read before it is called altered: a bit may flip on the way, and the next read is whole."""
MAX_SHARDS = 10_000_000
"""A plan may not have one walk a range for ever."""

Count = Annotated[int, Field(ge=1)]
"""Of what there is never none."""
Some = Annotated[int, Field(ge=0)]
"""Of what a shard may have none: filters and an engine may have left no row of it."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Record = TypeVar("Record")


class Created(Frozen):
    """Who began a dataset, when and with what."""

    owner: str
    at: str
    """UTC, ISO 8601."""
    by: str
    """Software and version."""


def _is_usual(value: str | int) -> bool:
    """Whether a key is left out of plans, so that those made before it was known keep their identity."""
    return value in ("teacher", 0)


class PlanShape(Frozen):
    """What every plan holds; what else it holds counts for its identity as well."""

    model_config = ConfigDict(extra="allow")

    schema_version: int
    kind: Kind
    created: Created
    policy: ModelIdentity
    lineage: Provenance | None
    teacher: ModelIdentity | None
    prompts: dict[str, Any]
    sampling: dict[str, Any]
    template: dict[str, Any]
    chat_template: str | None
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)]
    topk: Annotated[int, Field(ge=0, le=1024)]
    topk_support: Annotated[Literal["teacher", "student"], Field(exclude_if=_is_usual)] = "teacher"
    """Whose most likely tokens the teacher graded; stands in a plan only where they are the student's."""
    rollout_topk: Annotated[int, Field(ge=0, le=1024, exclude_if=_is_usual)] = 0
    """How many of the student's most likely ids each position holds; stands in a plan only where there are some."""
    shards: Annotated[int, Field(ge=1, le=MAX_SHARDS)]
    prompts_per_shard: Annotated[int, Field(ge=1, lt=2**31)]
    parent: Sha256 | None
    overrides: list[str]


class Commit(Frozen):
    """One shard, committed: what the object must be for a reader to accept it."""

    shard: Annotated[int, Field(ge=0)]
    file: str
    sha256: Sha256
    bytes: Count
    rows: Some
    prompt_tokens: Some
    tokens: Some
    stats: dict[str, float]
    rejected: tuple[Rejected, ...] = ()
    """Rows that are left out because an engine died of them or gave nothing; those that filters dropped are none."""

    @model_serializer(mode="wrap")
    def _without_no_rejected(self, as_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A commit that rejects nothing is the record it was before there were rejected rows, byte for byte."""
        record = as_dict(self)
        if not self.rejected:
            del record["rejected"]
        return record


class Manifest(Frozen):
    """All shards of a finished dataset."""

    schema_version: int
    dataset_id: str
    plan_sha256: Sha256
    kind: Kind
    overrides: tuple[str, ...]
    rows: Count
    prompt_tokens: Count
    tokens: Count
    shards: tuple[Commit, ...]


def created_now(owner: str | None) -> dict[str, str]:
    """The stamp of a dataset begun now: by `owner`, else by the user who runs this."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Created(owner=owner or getuser(), at=now, by=f"lightning-opd {version('lightning-opd')}").model_dump()


def commit_key(shard: int) -> str:
    """Where the commit of a shard lies."""
    return f"commits/{shard:06d}.json"


def committed_shards(store: Store) -> set[int]:
    """Shards with a commit, by a fresh listing; other files there are none of ours."""
    return {shard for entry in store.list("commits") if (shard := shard_of_commit(entry.name)) is not None}


def shard_of_commit(key: str) -> int | None:
    """Whose commit lies under this key; None for a name that is not exactly a commit's."""
    match = COMMIT_FILE.fullmatch(key)
    shard = int(match.group(1)) if match else 0
    return shard if match and key == commit_key(shard) else None


def check_plan(plan: Plan, where: str) -> None:
    """Refuse a plan that lacks something, or holds it in another type than its shape says."""
    shape = as_record(PlanShape, plan, where, REBUILD)
    try:
        same = canonical(shape.model_dump(mode="json")) == canonical(plan)
    except ValueError:  # nested too deep to be written
        same = False
    if not same:
        raise DataError("the plan holds a value of another type than it must have", where=where, fix=REBUILD)


def read_plan(store: Store) -> Plan:
    """The plan of the dataset in `store`. Raises `NotFound`, or `DataError` when it is altered or no plan."""
    return _read(store, PLAN, _parse_plan)


def read_commit(store: Store, shard: int) -> Commit:
    """The commit of a shard. Raises `NotFound`, or `DataError` when it is altered or another shard's."""
    return _read(store, commit_key(shard), _parse_commit)


def read_commits(store: Store, shards: Sequence[int]) -> Iterator[Commit]:
    """The commits of `shards`, in that order; read many at a time."""
    keys = [commit_key(shard) for shard in shards]
    for shard, (key, data) in zip(shards, store.get_many(keys), strict=True):
        try:
            yield _parse_commit(data, f"{store.url}/{key}")
        except DataError:
            yield read_commit(store, shard)


def read_manifest(store: Store) -> tuple[Manifest, Plan, str]:
    """Manifest, plan and the manifest's sha256, by which readers pin the dataset.

    Raises:
        NotFound: there is no manifest.
        DataError: it is altered, of another schema version, not one of its plan, or points outside its dataset.
    """
    manifest, digest = _read(store, MANIFEST, _parse_manifest)
    try:
        plan = _read(store, PLAN, lambda data, where: _parse_plan_of(manifest, data, where))
    except NotFound:
        raise DataError("the dataset has lost its plan.json", where=store.url, fix=REBUILD) from None
    check_manifest(manifest, plan, f"{store.url}/{MANIFEST}")
    return manifest, plan, digest


def check_manifest(manifest: Manifest, plan: Plan, where: str) -> None:
    """Refuse a manifest that is not one of this plan, or that points outside its dataset."""
    if len(manifest.shards) != plan["shards"]:
        raise DataError(f"{len(manifest.shards)} shards, the plan has {plan['shards']}", where=where, fix=REBUILD)
    said = {"dataset_id": dataset_id(plan), "kind": plan["kind"], "overrides": tuple(plan["overrides"])}
    for key, value in said.items():
        if getattr(manifest, key) != value:
            raise DataError(f"{key} {getattr(manifest, key)!r}, the plan says {value!r}", where=where, fix=REBUILD)
    for index, commit in enumerate(manifest.shards):
        if commit.shard != index:
            raise DataError(f"shard {index} is not in its place", where=where, fix=REBUILD)
        check_file(commit, where)
    for total in ("rows", "prompt_tokens", "tokens"):
        if getattr(manifest, total) != sum(getattr(commit, total) for commit in manifest.shards):
            raise DataError(f"the counts of {total} do not add up", where=where, fix=REBUILD)


def check_file(commit: Commit, where: str) -> None:
    """Refuse a commit whose file is not the one of its shard and its content."""
    if not DATA_FILE.fullmatch(commit.file):
        raise DataError(f"not a path of a shard: {commit.file!r}", where=where, fix="Do not trust this dataset")
    if commit.file != data_key(commit.shard, commit.sha256):
        raise DataError(f"shard {commit.shard} is not the content of {commit.file}", where=where, fix=REBUILD)


def data_key(shard: int, digest: str) -> str:
    """Where the bytes of a shard lie: under its number and its content's hash."""
    return f"data/{shard:06d}-{digest[:16]}.parquet"


def _read(store: Store, key: str, parse: Callable[[bytes, str], Record]) -> Record:
    where = f"{store.url}/{key}"
    for _ in range(READS - 1):
        try:
            return parse(store.get(key), where)
        except DataError:
            continue
    return parse(store.get(key), where)


def _parse_plan(data: bytes, where: str) -> Plan:
    _require_version(data, where)
    plan = unseal(data, where, REBUILD)
    check_plan(plan, where)
    return plan


def _parse_plan_of(manifest: Manifest, data: bytes, where: str) -> Plan:
    if sha256(data) != manifest.plan_sha256:
        raise DataError("plan.json is not the plan of this manifest", where=where, fix=REBUILD)
    return _parse_plan(data, where)


def _parse_commit(data: bytes, where: str) -> Commit:
    commit = as_record(Commit, unseal(data, where, REBUILD), where, REBUILD)
    if not where.endswith(f"/{commit_key(commit.shard)}"):
        raise DataError(f"this is the commit of shard {commit.shard}", where=where, fix=REBUILD)
    check_file(commit, where)
    return commit


def _parse_manifest(data: bytes, where: str) -> tuple[Manifest, str]:
    _require_version(data, where)
    return as_record(Manifest, unseal(data, where, REBUILD), where, REBUILD), sha256(data)


def _require_version(data: bytes, where: str) -> None:
    """Before the seal is asked for, which older versions do not have."""
    found = parse_object(data, where, REBUILD).get("schema_version")
    if found != schema.SCHEMA_VERSION:
        raise DataError(
            f"the dataset has schema version {found}, this software reads version {schema.SCHEMA_VERSION}",
            where=where,
            fix="Use the release that wrote it",
        )
