"""`lopd cache gc`: data objects that no commit names, and what killed writers left half-written.

Nothing that belongs to a dataset is ever deleted: not what a commit or the manifest names, nothing at all where one of
these records cannot be read, and no file of a name that is not ours. Young objects are left alone, since a worker
stores a shard before it commits it; their age is told by the store's clock, whatever this machine's says. Just before
each deletion the object's date and the commit of its shard are looked up again, so that one which was written anew or
committed meanwhile stays.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from common.cache.contents import Contents, find_datasets, leftovers_of, shard_of
from common.errors import LopdError, UsageError
from common.progress import duration, followed, size
from common.records import read_commit, read_commits, read_manifest, read_plan
from common.report import Table
from common.storage import Entry, NotFound, Store
from common.terminal import say, say_table

UNCOMMITTED_S = 3600.0
"""Least age, in seconds, of what a worker may be about to commit; no flag goes below it."""
DELETED_AT_ONCE = 64
"""Deletions between two listings."""
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Garbage:
    """One object that can go."""

    name: str
    bytes: int
    age_s: float
    what: str
    """`orphan`, or `unfinished write`."""
    modified: float
    """When the store took it; another time at the deletion means that it was written anew."""


@dataclass(frozen=True)
class Collected:
    """The garbage of one dataset, and what was done about it."""

    path: str
    """Below the prefix that was asked for."""
    url: str
    garbage: tuple[Garbage, ...] = ()
    young: int = 0
    """Objects that are left alone because they are younger than the limit."""
    deleted: int = 0
    refused: str | None = None
    """Why nothing, or nothing more, is deleted here."""


def collect(url: str, older_than_s: float, delete: bool) -> list[Collected]:
    """The garbage of every dataset at and below `url`, deleted when `delete` says so; sorted by path.

    Args:
        older_than_s: least age of what is garbage, in seconds.
    """
    prefix = Store(url)
    places = find_datasets(prefix)
    followed_places = followed(places, f"looking through {prefix.url}", len(places), "datasets")
    return [_collect(prefix, contents, older_than_s, delete) for contents in followed_places]


def parse_age(text: str) -> float:
    """Seconds: `90s`, `30m`, `24h`, `7d` or `2w`. Raises `UsageError`."""
    match = re.fullmatch(r"(\d{1,6})([smhdw])", text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no age", fix="Write a number and s, m, h, d or w, such as 24h")
    return timedelta(**{UNITS[match.group(2)]: int(match.group(1))}).total_seconds()


def show(collected: Sequence[Collected], delete: bool, older_than_s: float) -> None:
    """What was found and done, for people."""
    found = [(one, garbage) for one in collected for garbage in one.garbage]
    if found:
        rows = [
            (one.path or ".", garbage.name, garbage.what, size(garbage.bytes), duration(garbage.age_s))
            for one, garbage in found
        ]
        say_table(Table(("dataset", "object", "what", "size", "age"), rows), right=(3, 4))
    for one in collected:
        if one.refused:
            refusal = "nothing more is deleted here" if one.deleted else "nothing is deleted here"
            say(f"{one.path or one.url}: {refusal}: {one.refused}", "red")
    total = f"{len(found)} objects, {size(sum(garbage.bytes for _, garbage in found))}"
    if delete:
        say(f"deleted {sum(one.deleted for one in collected)} of {total}")
    elif found:
        say(f"{total}; give --delete to delete them")
    else:
        say("nothing to collect")
    young = sum(one.young for one in collected)
    if young:
        say(f"{young} more are younger than {duration(older_than_s)}, or may yet be committed, and are left alone")


def _collect(prefix: Store, contents: Contents, older_than_s: float, delete: bool) -> Collected:
    store = prefix.child(contents.path) if contents.path else prefix
    report = Collected(contents.path, store.url)
    try:
        read_plan(store)  # what is no dataset of ours is not ours to clean
        leftovers = leftovers_of(store.leftovers())
        if not leftovers and not _may_hold_orphans(contents):
            return report
        orphans = _orphans(store, contents)
        if not orphans and not leftovers:
            return report
        report = _by_age(report, contents, orphans, leftovers, store.now(), older_than_s)
        garbage = report.garbage if delete else ()
        for deleted in followed(_delete(store, garbage), f"deleting in {store.url}", len(garbage), "objects"):
            report = replace(report, deleted=report.deleted + deleted)
    except LopdError as error:
        return replace(report, refused=str(error).splitlines()[0])
    return report


def _may_hold_orphans(contents: Contents) -> bool:
    """False when every object is the only one of a committed shard: no commit need be read to see that all is well."""
    shards = [shard_of(name) for name in contents.data]
    return len({*shards}) < len(shards) or not {*shards} <= contents.commits.keys()


def _orphans(store: Store, contents: Contents) -> list[Entry]:
    """Data objects that neither a commit nor the manifest names. Raises when one of these cannot be read."""
    named: set[str] = set()
    if contents.finished:
        manifest, _, _ = read_manifest(store)
        named |= {commit.file for commit in manifest.shards}
    commits = read_commits(store, sorted(contents.commits))
    named |= {commit.file for commit in followed(commits, "reading commits", len(contents.commits), "commits")}
    return [entry for name, entry in contents.data.items() if name not in named]


def _by_age(
    report: Collected, contents: Contents, orphans: list[Entry], leftovers: list[Entry], now: float, older_than_s: float
) -> Collected:
    """The report with what is old enough; an object without a date is young."""
    garbage, young = [], 0
    for entry, what in [(entry, "orphan") for entry in orphans] + [(entry, "unfinished write") for entry in leftovers]:
        settled = what == "orphan" and shard_of(entry.name) in contents.commits
        least = older_than_s if settled else max(older_than_s, UNCOMMITTED_S)
        age = now - entry.modified
        if entry.modified and age >= least:
            garbage.append(Garbage(entry.name, entry.size, age, what, entry.modified))
        else:
            young += 1
    return replace(report, garbage=tuple(garbage), young=young)


def _delete(store: Store, garbage: Sequence[Garbage]) -> Iterator[int]:
    """Delete what is still garbage by fresh listings; yields 1 for each object that was deleted."""
    for first in range(0, len(garbage), DELETED_AT_ONCE):
        some = garbage[first : first + DELETED_AT_ONCE]
        there = {entry.name: entry.modified for entry in [*store.list("data"), *store.leftovers()]}
        for one in some:
            if there.get(one.name) != one.modified:
                continue  # gone, or written anew
            if one.what == "orphan" and _is_named(store, one.name):
                continue
            store.remove(one.name)
            log.info("deleted %s/%s", store.url, one.name)
            yield 1


def _is_named(store: Store, name: str) -> bool:
    """Whether the commit of its shard names the object now. Raises when that cannot be read."""
    try:
        return read_commit(store, shard_of(name)).file == name
    except NotFound:
        return False
