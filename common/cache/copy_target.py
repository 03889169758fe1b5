"""What lies where a copy is to go: nothing, a part of the same dataset, what was altered of it, or another dataset."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.cache.contents import Contents
from common.canonical import parse_object, seal, unseal
from common.errors import DataError, LopdError
from common.plans import Plan, another_plan, content
from common.progress import followed
from common.records import CARD, MANIFEST, PLAN, READS, Commit, Manifest, commit_key, read_plan
from common.storage import Store

MEND = "Copy again with --repair, from a copy that is sound"


@dataclass(frozen=True)
class Wanted:
    """The dataset to copy, with its sealed records as they are stored, byte for byte."""

    manifest: Manifest
    plan: Plan
    digest: str
    """The manifest's sha256."""
    records: Mapping[str, bytes] = field(repr=False)
    """plan.json and MANIFEST.json."""

    def commit(self, commit: Commit) -> bytes:
        """The record of a commit: the manifest holds all of them."""
        return seal(commit.model_dump())


def altered_records(target: Store, there: Contents, wanted: Wanted) -> list[str]:
    """Names of the records that are there and no more what somebody wrote, as their seals tell; the manifest first.

    Raises:
        DataError: a record is whole and another dataset's, so that nothing of this one is to be written here.
    """
    keys = [name for name in (MANIFEST, PLAN) if name in there.records]
    commits = {commit_key(commit.shard): commit for commit in wanted.manifest.shards if commit.shard in there.commits}
    keys += commits
    altered = []
    for key, data in followed(target.get_many(keys), "comparing records", len(keys), "records"):
        expected = wanted.commit(commits[key]) if key in commits else wanted.records[key]
        if data != expected and not _is_read_anew(target, key, expected):
            if _is_whole(data):
                raise _other(target, key, wanted)
            altered.append(key)
    return altered


def refuse_altered(target: Store, altered: list[str]) -> None:
    """Refuse to write beside what was altered. Raises `DataError`."""
    if altered:
        more = f", as {len(altered) - 1} others were" if altered[1:] else ""
        raise DataError(
            f"the record was altered: it does not fit its seal{more}", where=f"{target.url}/{altered[0]}", fix=MEND
        )


def absent_from(there: Contents, manifest: Manifest) -> list[str]:
    """Names of the shards and commits that are not there, or of another size; the records likewise."""
    absent = [commit.file for commit in manifest.shards if not has_shard(there, commit)]
    absent += [commit_key(commit.shard) for commit in manifest.shards if commit.shard not in there.commits]
    return absent + [name for name in (PLAN, CARD) if name not in there.records]


def has_shard(there: Contents, commit: Commit) -> bool:
    """Whether the shard lies there, told by its name, which holds its hash, and its size."""
    entry = there.data.get(commit.file)
    return entry is not None and entry.size == commit.bytes


def _is_read_anew(target: Store, key: str, expected: bytes) -> bool:
    """Whether another read brings what is expected: a bit may flip on the way."""
    return any(target.get(key) == expected for _ in range(READS - 1))


def _is_whole(data: bytes) -> bool:
    """Whether somebody wrote it so. What never had a seal is older software's, and nothing that was altered."""
    try:
        if "seal" not in parse_object(data, ""):
            return True
        unseal(data, "")
    except DataError:
        return False
    return True


def _other(target: Store, key: str, wanted: Wanted) -> LopdError:
    if key == MANIFEST:
        return DataError(
            "another finished dataset lies here", where=target.url, fix="Copy to a place where there is none"
        )
    if key != PLAN:
        return DataError(
            "the shard is committed here with another content",
            where=f"{target.url}/{key}",
            fix="Copy to a place where there is no dataset",
        )
    return other_plan(target, wanted.plan)


def other_plan(target: Store, plan: Plan) -> LopdError:
    """The error that says whose plan lies at the target instead of this one."""
    theirs = read_plan(target)
    if content(theirs) != content(plan):
        return another_plan(theirs, plan, target.url)
    return DataError(
        f"another dataset of the same plan was begun here by {theirs['created']['owner']}, {theirs['created']['at']}",
        where=target.url,
        fix="Copy to a place where there is none",
    )
