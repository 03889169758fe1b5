"""Making a dataset: any number of workers join one plan, commit its shards, and any of them finishes it.

Only the create-only commit decides. What a dead worker left behind is an object that nothing names.
"""

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from common import parquet, schema
from common.canonical import canonical, parse_object, seal, sha256
from common.card import dataset_card
from common.errors import DataError
from common.plans import Plan, another_plan, content, dataset_id
from common.records import (
    CARD,
    MANIFEST,
    PLAN,
    READS,
    Commit,
    Manifest,
    check_plan,
    commit_key,
    committed_shards,
    data_key,
    read_commit,
    read_commits,
    read_plan,
)
from common.rejected import REASON, Rejected
from common.storage import AlreadyExists, Store

LISTING_SHARE = 0.1
"""Share of its time that a worker spends on listing what is left, at most."""


def create_dataset(url: str, plan: Plan, *, single_writer: bool = False) -> "DatasetWriter":
    """Start a dataset at `url`, or join the one that is being made there by a plan of the same content.

    Args:
        single_writer: nobody else writes to this dataset, so that a store without create-only writes will do.

    Raises:
        DataError: the plan lacks something, or another plan lies there; the message names the keys that differ.
        StorageError: the store ignores create-only writes.
    """
    store = Store(url, single_writer=single_writer)
    check_plan(parse_object(canonical(plan), PLAN), f"{store.url}/{PLAN}")
    store.require_create_only()
    try:
        store.put_new(PLAN, seal(plan))
    except AlreadyExists:
        theirs = read_plan(store)
        if content(theirs) != content(plan):
            raise another_plan(theirs, plan, store.url) from None
        return DatasetWriter(store, theirs)
    return DatasetWriter(store, plan)


class DatasetWriter:
    """A dataset being made. Safe to hold in many workers at once."""

    def __init__(self, store: Store, plan: Plan) -> None:
        self.store, self.plan, self.url = store, plan, store.url

    def pending(self) -> list[int]:
        """Shards without a commit, by a fresh listing."""
        done = committed_shards(self.store)
        return [shard for shard in range(self.plan["shards"]) if shard not in done]

    def shards_left(self) -> Iterator[int]:
        """Shards to do, one at a time, each once; ends when every other shard is committed.

        The order is drawn anew by every caller and the listing is renewed as it goes, so that workers who know
        nothing of each other do little twice: at most what is in flight elsewhere.
        """
        handed_out: set[int] = set()
        while True:
            started = time.monotonic()
            left = [shard for shard in self.pending() if shard not in handed_out]
            cost = time.monotonic() - started
            if not left:
                return
            random.shuffle(left)
            for shard in left:
                handed_out.add(shard)
                yield shard
                if time.monotonic() - started > cost / LISTING_SHARE:
                    break

    def commit(
        self,
        shard: int,
        table: pa.Table,
        stats: Mapping[str, float] | None = None,
        rejected: Mapping[str, str] | None = None,
    ) -> Commit:
        """Check, store and commit one shard; returns the commit that holds, which may be another worker's.

        Args:
            table: its rows; there may be none.
            rejected: why rows are not among them that nobody could make, by uid. Of a reason, the first 500 characters
                are kept.

        Raises:
            DataError: the table breaks the contract, a statistic is no number, or a rejected row stands in the table;
                nothing was written.
        """
        where = f"{self.url}, shard {shard}"
        scored = self.plan["kind"] == "scored"
        schema.check_table(table, vocab_size=self.plan["vocab_size"], scored=scored, where=where)
        found, planned = schema.widths_of(table.schema), schema.widths_in(self.plan)
        if found.topk != planned.topk:
            raise DataError(f"top-k of {found.topk}, the plan says {planned.topk}", where=where)
        if found != planned:
            raise DataError(
                f"the student's top-k of {found.rollout_topk}, the plan says {planned.rollout_topk}", where=where
            )
        for name, value in (stats or {}).items():
            if not math.isfinite(value):
                raise DataError(f"the statistic {name} is {value}", where=where)
        left_out = _left_out(table, rejected or {}, where)
        data, announced = parquet.encode(table, where), parquet.announced(table)
        digest = sha256(data)
        commit = Commit(
            shard=shard,
            file=data_key(shard, digest),
            sha256=digest,
            bytes=len(data),
            rows=announced.rows,
            prompt_tokens=announced.prompt_tokens,
            tokens=announced.tokens,
            stats=dict(stats or {}),
            rejected=left_out,
        )
        self.store.put(commit.file, data)
        try:
            self.store.put_new(commit_key(shard), seal(commit.model_dump()))
        except AlreadyExists:
            return read_commit(self.store, shard)
        return commit

    def finalize(self) -> str:
        """Write card and manifest once every shard is committed; returns the manifest's sha256.

        Deterministic: any worker that calls it writes the same bytes, so all of them succeed.

        Raises:
            DataError: a shard is not committed, an object is lost, or no shard has any row.
        """
        commits = self._commits()
        if not any(commit.rows for commit in commits):
            raise _no_rows(commits, self.url)
        manifest = Manifest(
            schema_version=schema.SCHEMA_VERSION,
            dataset_id=dataset_id(self.plan),
            plan_sha256=sha256(seal(self.plan)),
            kind=self.plan["kind"],
            overrides=tuple(self.plan["overrides"]),
            rows=sum(commit.rows for commit in commits),
            prompt_tokens=sum(commit.prompt_tokens for commit in commits),
            tokens=sum(commit.tokens for commit in commits),
            shards=tuple(commits),
        )
        data = seal(manifest.model_dump())
        self.store.put(CARD, dataset_card(self.plan, manifest.model_dump()).encode())
        self.store.put_new(MANIFEST, data)
        return sha256(data)

    def _commits(self) -> list[Commit]:
        """Every commit, once each has its object. Listings are read again: nothing guards them from a flipped bit."""
        for _ in range(READS):
            missing = self.pending()
            if not missing:
                break
        else:
            raise DataError(f"{len(missing)} of {self.plan['shards']} shards are not committed yet", where=self.url)
        commits = list(read_commits(self.store, range(self.plan["shards"])))
        lost: list[Commit] = []
        for _ in range(READS):
            stored = {entry.name: entry.size for entry in self.store.list("data")}
            lost = [commit for commit in commits if stored.get(commit.file) != commit.bytes]
            if not lost:
                return commits
        raise DataError(
            "a committed object is missing or has another size",
            where=f"{self.url}/{lost[0].file}",
            fix=f"Have {commit_key(lost[0].shard)} removed by one who may; the same command then makes it anew",
        )


def _left_out(table: pa.Table, rejected: Mapping[str, str], where: str) -> tuple[Rejected, ...]:
    """The rejected rows of a shard, by uid; none of them is a row of its table."""
    for uid in table["uid"].to_pylist() if rejected else ():
        if uid in rejected:
            raise DataError("it is rejected, and a row of the shard", where=f"{where}, row {uid}")
    reasons = {uid: " ".join(reason.split())[:REASON] or "no reason was given" for uid, reason in rejected.items()}
    return tuple(Rejected(uid=uid, reason=reason) for uid, reason in sorted(reasons.items()))


def _no_rows(commits: Sequence[Commit], url: str) -> DataError:
    """The error that says where all the rows went."""
    rejected = [row for commit in commits for row in commit.rejected]
    why = f"; {len(rejected)} were rejected, the first ({rejected[0].uid}): {rejected[0].reason}" if rejected else ""
    return DataError(
        f"no shard has any row{why}",
        where=url,
        fix="Filters, or the engine, took all of them: mend that, and make the dataset at another URL",
    )
