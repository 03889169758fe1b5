"""`lopd cache copy`: a finished dataset to another place, byte for byte.

Plan first, so that nothing else is begun there; then the shards, each verified by its hash as it is read; commits,
card, and the manifest last: until it is there, nobody takes the copy for one. Killed at any point, the same command
goes on.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from common.cache.contents import Contents, list_contents
from common.cache.transfer import in_parallel, record_bytes, shard_bytes
from common.canonical import seal, sha256
from common.card import dataset_card
from common.errors import DataError, LopdError, UsageError
from common.plans import Plan, another_plan, content
from common.progress import BYTES, Progress, followed, size, waiting
from common.records import (
    CARD,
    MANIFEST,
    PLAN,
    Commit,
    Manifest,
    commit_key,
    read_manifest,
    read_plan,
)
from common.storage import AlreadyExists, NotFound, Store, is_url
from common.terminal import say

SHARDS_AT_ONCE = 4
"""Each is held in memory while it travels, and may have 100 MB and more."""
RECORDS_AT_ONCE = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copied:
    """What a copy did. The manifest's sha256 is the same at both ends."""

    source: str
    target: str
    manifest_sha256: str
    shards: int
    bytes: int
    """Of all shards."""
    shards_copied: int
    """By this command; the others were there."""
    bytes_copied: int


def copy(source_url: str, target_url: str) -> Copied:
    """Copy the finished dataset at `source_url` to `target_url`, or go on with a copy that was begun there.

    Raises:
        UsageError: one lies within the other.
        DataError: the source is unfinished or altered, or another dataset lies at the target.
    """
    source, target = Store(source_url), Store(target_url)
    if _place(source) == _place(target):
        manifest, _, digest = _read_source(source)
        return _outcome(source, target, manifest, digest, [])
    _refuse_within(source, target)
    manifest, plan, digest = _read_source(source)
    there = list_contents(target)
    _refuse_other(target, there, digest)
    missing = [commit for commit in manifest.shards if not _has(there, commit)]
    if there.finished and not _absent(there, manifest):
        return _outcome(source, target, manifest, digest, [])
    target.require_create_only()
    _put_plan(target, plan, record_bytes(source, PLAN, manifest.plan_sha256))
    _copy_shards(source, target, manifest, missing)
    _put_commits(target, there, manifest)
    target.put(CARD, _card(source, plan, manifest))
    _require_all(target, manifest)
    _put_manifest(target, record_bytes(source, MANIFEST, digest))
    return _outcome(source, target, manifest, digest, missing)


def show(copied: Copied) -> None:
    """What was done, for people."""
    if not copied.shards_copied:
        say(f"nothing to do: {copied.target} holds all {copied.shards} shards")
    else:
        there = copied.shards - copied.shards_copied
        were_there = f", {there} were there" if there else ""
        say(f"copied {copied.shards_copied} shards, {size(copied.bytes_copied)}, to {copied.target}{were_there}")
    say(f"manifest sha256 {copied.manifest_sha256}, the same at both ends")


def _read_source(source: Store) -> tuple[Manifest, Plan, str]:
    try:
        with waiting(f"reading {source.url}"):
            return read_manifest(source)
    except NotFound:
        raise DataError(
            "there is no finished dataset here, and no other is copied",
            where=source.url,
            fix="See how far it is with `lopd cache status`",
        ) from None


def _refuse_within(source: Store, target: Store) -> None:
    here, there = _place(source), _place(target)
    if there.startswith(f"{here}/") or here.startswith(f"{there}/"):
        raise UsageError(
            "one of the two places lies within the other",
            where=f"{source.url}, {target.url}",
            fix="Copy to a place beside it",
        )


def _place(store: Store) -> str:
    """Where it is, by whatever links one came there."""
    return store.url if is_url(store.url) else os.path.realpath(store.url)


def _refuse_other(target: Store, there: Contents, digest: str) -> None:
    """Refuse a target with another manifest, before anything is written there."""
    if there.finished and sha256(target.get(MANIFEST)) != digest:
        raise DataError(
            "another finished dataset lies here", where=target.url, fix="Copy to a place where there is none"
        )


def _put_plan(target: Store, plan: Plan, data: bytes) -> None:
    try:
        target.put_new(PLAN, data)
    except AlreadyExists:
        raise _other_dataset(target, plan) from None


def _other_dataset(target: Store, plan: Plan) -> LopdError:
    theirs = read_plan(target)
    if content(theirs) != content(plan):
        return another_plan(theirs, plan, target.url)
    return DataError(
        f"another dataset of the same plan was begun here by {theirs['created']['owner']}, {theirs['created']['at']}",
        where=target.url,
        fix="Copy to a place where there is none",
    )


def _has(there: Contents, commit: Commit) -> bool:
    """Whether the shard lies there, told by its name, which holds its hash, and its size."""
    entry = there.data.get(commit.file)
    return entry is not None and entry.size == commit.bytes


def _copy_shards(source: Store, target: Store, manifest: Manifest, missing: Sequence[Commit]) -> None:
    if not missing:
        return

    def copy_shard(commit: Commit) -> Commit:
        target.put(commit.file, shard_bytes(source, commit))
        log.debug("copied %s", commit.file)
        return commit

    total = sum(commit.bytes for commit in manifest.shards)
    done = total - sum(commit.bytes for commit in missing)
    with Progress(f"copying {len(missing)} shards", total, BYTES, done, brief=True) as progress:
        for commit in in_parallel(copy_shard, missing, SHARDS_AT_ONCE):
            progress.advance(commit.bytes, commit.bytes)


def _put_commits(target: Store, there: Contents, manifest: Manifest) -> None:
    """The commits as the manifest holds them, which are those of the source, byte for byte."""
    known = [commit for commit in manifest.shards if commit.shard in there.commits]
    found = target.get_many([commit_key(commit.shard) for commit in known])
    for commit, (key, data) in zip(known, followed(found, "comparing commits", len(known), "commits"), strict=True):
        if data != seal(commit.model_dump()):
            raise DataError(
                "the shard is committed here with another content",
                where=f"{target.url}/{key}",
                fix="Copy to a place where there is no dataset",
            )

    def put_commit(commit: Commit) -> None:
        target.put_new(commit_key(commit.shard), seal(commit.model_dump()))

    new = [commit for commit in manifest.shards if commit.shard not in there.commits]
    for _ in followed(in_parallel(put_commit, new, RECORDS_AT_ONCE), "writing commits", len(new), "commits"):
        pass


def _card(source: Store, plan: Plan, manifest: Manifest) -> bytes:
    """The card as it stands at the source; made anew where it was lost."""
    try:
        return source.get(CARD)
    except NotFound:
        return dataset_card(plan, manifest.model_dump()).encode()


def _require_all(target: Store, manifest: Manifest) -> None:
    """By a fresh listing, before the manifest says that all of it is there."""
    absent = _absent(list_contents(target), manifest)
    if absent:
        raise DataError(
            f"{len(absent)} objects are not there, or of another size, though they were just written",
            where=f"{target.url}/{absent[0]}",
            fix="See who else writes there, then run the same command again",
        )


def _absent(there: Contents, manifest: Manifest) -> list[str]:
    """Names of the shards and commits that are not there, or of another size; the records likewise."""
    absent = [commit.file for commit in manifest.shards if not _has(there, commit)]
    absent += [commit_key(commit.shard) for commit in manifest.shards if commit.shard not in there.commits]
    return absent + [name for name in (PLAN, CARD) if name not in there.records]


def _put_manifest(target: Store, data: bytes) -> None:
    try:
        target.put_new(MANIFEST, data)
    except AlreadyExists:
        raise DataError("somebody else finished another dataset here meanwhile", where=target.url) from None
    log.info("%s: finished", target.url)


def _outcome(source: Store, target: Store, manifest: Manifest, digest: str, copied: Sequence[Commit]) -> Copied:
    return Copied(
        source=source.url,
        target=target.url,
        manifest_sha256=digest,
        shards=len(manifest.shards),
        bytes=sum(commit.bytes for commit in manifest.shards),
        shards_copied=len(copied),
        bytes_copied=sum(commit.bytes for commit in copied),
    )
