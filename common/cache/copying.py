"""`lopd cache copy`: a finished dataset to another place, byte for byte.

Plan first, so that nothing else is begun there; then the shards, each verified by its hash as it is read, and its
commit right after it, so that no `gc` takes it for nobody's; card, and the manifest last: until it is there, nobody
takes the copy for one. Killed at any point, the same command goes on.

What is there is told by names and sizes, and records by their seals. To repair, the shards there are read and hashed
too. One that differs is written again, over itself, for its name is its content's hash; a record that does not fit its
seal is removed and written anew. A record that fits and is another is another dataset's, and nothing is touched.
"""

import logging
import os
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from common.cache.contents import Contents, list_contents
from common.cache.copy_target import Wanted, absent_from, altered_records, has_shard, other_plan, refuse_altered
from common.cache.transfer import in_parallel, record_bytes
from common.card import dataset_card
from common.dataset import shard_bytes
from common.errors import DataError, UsageError
from common.progress import BYTES, Progress, size, waiting
from common.records import CARD, MANIFEST, PLAN, Commit, Manifest, commit_key, read_manifest
from common.storage import AlreadyExists, NotFound, Store
from common.terminal import say
from common.urls import is_url

SHARDS_AT_ONCE = 4
"""Each is held in memory while it travels, and may have 100 MB and more."""

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
    altered_records: tuple[str, ...] = ()
    """Names of the records that did not fit their seals, or the card its original, and were written anew."""


def copy(source_url: str, target_url: str, repair: bool = False) -> Copied:
    """Copy the finished dataset at `source_url` to `target_url`, or go on with a copy that was begun there.

    Args:
        repair: read what lies at the target too, and write anew what was altered.

    Raises:
        UsageError: one lies within the other.
        DataError: the source is unfinished or altered, another dataset lies at the target, or an altered one that is
            not to be repaired.
    """
    source, target = Store(source_url), Store(target_url)
    if _place(source) == _place(target):
        if repair:
            raise UsageError("a dataset cannot be repaired from itself", where=source.url, fix="Copy from another one")
        return _outcome(source, target, _read_source(source), [])
    _refuse_within(source, target)
    wanted = _read_source(source)
    there = list_contents(target)
    altered = altered_records(target, there, wanted)
    if not repair:
        refuse_altered(target, altered)
        if there.finished and not absent_from(there, wanted.manifest):
            return _outcome(source, target, wanted, [])
    return _copy(source, target, wanted, altered, there, repair)


def show(copied: Copied) -> None:
    """What was done, for people."""
    if copied.altered_records:
        say(f"written anew: {', '.join(copied.altered_records)}")
    if not copied.shards_copied:
        nothing = "nothing else" if copied.altered_records else "nothing"
        say(f"{nothing} to do: {copied.target} holds all {copied.shards} shards")
    else:
        there = copied.shards - copied.shards_copied
        were_there = f", {there} were there" if there else ""
        say(f"copied {copied.shards_copied} shards, {size(copied.bytes_copied)}, to {copied.target}{were_there}")
    say(f"manifest sha256 {copied.manifest_sha256}, the same at both ends")


def _read_source(source: Store) -> Wanted:
    try:
        with waiting(f"reading {source.url}"):
            manifest, plan, digest = read_manifest(source)
    except NotFound:
        raise DataError(
            "there is no finished dataset here, and no other is copied",
            where=source.url,
            fix="See how far it is with `lopd cache status`",
        ) from None
    records = {PLAN: record_bytes(source, PLAN, manifest.plan_sha256), MANIFEST: record_bytes(source, MANIFEST, digest)}
    return Wanted(manifest, plan, digest, records)


def _copy(
    source: Store, target: Store, wanted: Wanted, altered: Sequence[str], there: Contents, repair: bool
) -> Copied:
    """Write what is not there or was altered, the manifest last."""
    target.require_create_only()
    for key in altered:  # the manifest first: nobody reads what is being repaired
        target.remove(key)
    _put_plan(target, wanted)
    committed = there.commits.keys() - {
        commit.shard for commit in wanted.manifest.shards if commit_key(commit.shard) in altered
    }
    copied = _copy_shards(source, target, wanted, there, committed, repair)
    card = _card(source, wanted)
    if not repair or CARD not in there.records or target.get(CARD) != card:
        altered = [*altered, *([CARD] if repair and CARD in there.records else [])]
        target.put(CARD, card)
    _require_all(target, wanted.manifest)
    _put_manifest(target, wanted.records[MANIFEST])
    return replace(_outcome(source, target, wanted, copied), altered_records=tuple(altered))


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


def _put_plan(target: Store, wanted: Wanted) -> None:
    try:
        target.put_new(PLAN, wanted.records[PLAN])
    except AlreadyExists:
        raise other_plan(target, wanted.plan) from None


def _copy_shards(
    source: Store, target: Store, wanted: Wanted, there: Contents, committed: Set[int], repair: bool
) -> list[Commit]:
    """Every shard that is not there as it must be, and every commit; returns the commits of the shards."""

    def copy_shard(commit: Commit) -> tuple[Commit, bool]:
        new = not has_shard(there, commit) or (repair and not _is_sound(target, commit))
        if new:
            target.put(commit.file, shard_bytes(source, commit))
            log.debug("copied %s", commit.file)
        if commit.shard not in committed:
            _put_commit(target, commit, wanted)
        return commit, new

    shards = wanted.manifest.shards
    left = shards if repair else [one for one in shards if not (has_shard(there, one) and one.shard in committed)]
    total, to_do, copied = sum(one.bytes for one in shards), sum(one.bytes for one in left), []
    with Progress(f"copying {len(left)} shards", total, BYTES, total - to_do, brief=True) as progress:
        for commit, new in in_parallel(copy_shard, left, SHARDS_AT_ONCE):
            copied += [commit] if new else []
            progress.advance(commit.bytes, commit.bytes)
    return copied


def _is_sound(target: Store, commit: Commit) -> bool:
    try:
        shard_bytes(target, commit)
    except DataError:
        return False
    return True


def _put_commit(target: Store, commit: Commit, wanted: Wanted) -> None:
    try:
        target.put_new(commit_key(commit.shard), wanted.commit(commit))
    except AlreadyExists:
        raise DataError(
            "somebody else committed the shard here meanwhile, with another content",
            where=f"{target.url}/{commit_key(commit.shard)}",
            fix="Copy to a place where there is no dataset",
        ) from None


def _card(source: Store, wanted: Wanted) -> bytes:
    """The card as it stands at the source; made anew where it was lost."""
    try:
        return source.get(CARD)
    except NotFound:
        return dataset_card(wanted.plan, wanted.manifest.model_dump()).encode()


def _require_all(target: Store, manifest: Manifest) -> None:
    """By a fresh listing, before the manifest says that all of it is there."""
    absent = absent_from(list_contents(target), manifest)
    if absent:
        raise DataError(
            f"{len(absent)} objects are not there, or of another size, though they were just written",
            where=f"{target.url}/{absent[0]}",
            fix="See who else writes there, then run the same command again",
        )


def _put_manifest(target: Store, data: bytes) -> None:
    try:
        target.put_new(MANIFEST, data)
    except AlreadyExists:
        raise DataError("somebody else finished another dataset here meanwhile", where=target.url) from None
    log.info("%s: finished", target.url)


def _outcome(source: Store, target: Store, wanted: Wanted, copied: Sequence[Commit]) -> Copied:
    return Copied(
        source=source.url,
        target=target.url,
        manifest_sha256=wanted.digest,
        shards=len(wanted.manifest.shards),
        bytes=sum(commit.bytes for commit in wanted.manifest.shards),
        shards_copied=len(copied),
        bytes_copied=sum(commit.bytes for commit in copied),
    )
