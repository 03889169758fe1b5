"""`lopd cache gc`: shards that lost to another, and what killed workers left half-written.

A data object is deleted only when its shard has a commit, and that commit names another object: the first commit has
won, and nothing can ever name this one. Of a shard without a commit any object may be the one that a worker is about
to commit, one who stored the very same bytes anew too; so these are listed and left, however old they are. The
manifest's objects stay as well, whatever the commits say. Half-written files, which a writer to a local folder leaves
behind when it is killed, go by their age alone, by the store's clock, and by an hour at least.

Nothing is deleted in a dataset of which a record cannot be read, and no file of a name that is not ours. Just before
each deletion the object's date and the commit of its shard are read again. Commits are for ever: who removes one by
hand to have its shard made again lets no gc run meanwhile.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from common.cache.contents import Contents, find_datasets, leftovers_of, shard_of
from common.cache.find import require_place
from common.errors import LopdError, RetryLater, UsageError
from common.progress import duration, followed, size
from common.records import read_commit, read_commits, read_manifest, read_plan
from common.report import Table
from common.storage import Entry, NotFound, Store
from common.terminal import say, say_table

HALF_WRITTEN_S = 3600.0
"""Least age, in seconds, of a half-written file that nobody writes any more; no flag goes below it."""
DELETED_AT_ONCE = 64
"""Deletions between two listings."""
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
ORPHAN, UNCOMMITTED, HALF_WRITTEN = "orphan", "may yet be committed", "half-written"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Remnant:
    """One object that no commit and no manifest names."""

    name: str
    bytes: int
    age_s: float
    what: str
    """`orphan`, `half-written`, or `may yet be committed`."""
    modified: float
    """When the store took it; another time at the deletion means that it was written anew."""


@dataclass(frozen=True)
class Collected:
    """The garbage of one dataset, and what was done about it."""

    path: str
    """Below the prefix that was asked for."""
    url: str
    garbage: tuple[Remnant, ...] = ()
    """What can go: orphans and half-written files, of the age that was asked for."""
    uncommitted_objects: tuple[Remnant, ...] = ()
    """Objects of shards without a commit, which are never deleted."""
    young: int = 0
    """Orphans and half-written files that are left alone because they are younger than the limit."""
    deleted: int = 0
    refused: str | None = None
    """Why nothing, or nothing more, is deleted here."""
    exit_code: int = 0
    """Of that refusal."""


def collect(url: str, older_than_s: float, delete: bool) -> list[Collected]:
    """The garbage of every dataset at and below `url`, deleted when `delete` says so; sorted by path.

    Args:
        older_than_s: least age of what is garbage, in seconds.
    """
    prefix = Store(url)
    require_place(prefix)
    places = find_datasets(prefix)
    followed_places = followed(places, f"looking through {prefix.url}", len(places), "datasets")
    return [_collect(prefix, contents, older_than_s, delete) for contents in followed_places]


def exit_code(collected: Sequence[Collected]) -> int:
    """The worst refusal's own; that of an outage only where nothing is wrong that another try would not mend."""
    codes = [one.exit_code for one in collected if one.refused]
    return max(codes, key=lambda code: (code != RetryLater.exit_code, code), default=0)


def parse_age(text: str) -> float:
    """Seconds: `90s`, `30m`, `24h`, `7d` or `2w`. Raises `UsageError`."""
    match = re.fullmatch(r"(\d{1,6})([smhdw])", text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no age", fix="Write a number and s, m, h, d or w, such as 24h")
    return timedelta(**{UNITS[match.group(2)]: int(match.group(1))}).total_seconds()


def show(collected: Sequence[Collected], delete: bool, older_than_s: float) -> None:
    """What was found and done, for people."""
    rows = [
        (one.path or ".", remnant.name, remnant.what, size(remnant.bytes), duration(remnant.age_s))
        for one in collected
        for remnant in (*one.garbage, *one.uncommitted_objects)
    ]
    if rows:
        say_table(Table(("dataset", "object", "what", "size", "age"), rows), right=(3, 4))
    for one in collected:
        if one.refused:
            refusal = "nothing more is deleted here" if one.deleted else "nothing is deleted here"
            say(f"{one.path or one.url}: {refusal}: {one.refused}", "red")
    garbage = [remnant for one in collected for remnant in one.garbage]
    total = f"{len(garbage)} objects, {size(sum(remnant.bytes for remnant in garbage))}"
    if delete:
        say(f"deleted {sum(one.deleted for one in collected)} of {total}")
    elif garbage:
        say(f"{total}; give --delete to delete them")
    else:
        say("nothing to collect")
    uncommitted = sum(len(one.uncommitted_objects) for one in collected)
    if uncommitted:
        say(f"{uncommitted} more may yet be committed: their shards have no commit, and they are left alone")
    young = sum(one.young for one in collected)
    if young:
        say(f"{young} more are younger than {duration(older_than_s)}, or just being written, and are left alone")


def _collect(prefix: Store, contents: Contents, older_than_s: float, delete: bool) -> Collected:
    store = prefix.child(contents.path) if contents.path else prefix
    report = Collected(contents.path, store.url)
    try:
        read_plan(store)  # what is no dataset of ours is not ours to clean
        leftovers = leftovers_of(store.leftovers())
        if not leftovers and not _may_hold_orphans(contents):
            return report
        unnamed = _unnamed(store, contents)
        if not unnamed and not leftovers:
            return report
        report = _sorted_out(report, contents, unnamed, leftovers, store.now(), older_than_s)
        garbage = report.garbage if delete else ()
        for deleted in followed(_delete(store, garbage), f"deleting in {store.url}", len(garbage), "objects"):
            report = replace(report, deleted=report.deleted + deleted)
    except LopdError as error:
        return replace(report, refused=str(error).splitlines()[0], exit_code=error.exit_code)
    return report


def _may_hold_orphans(contents: Contents) -> bool:
    """False when every object is the only one of a committed shard: no commit need be read to see that all is well."""
    shards = [shard_of(name) for name in contents.data]
    return len({*shards}) < len(shards) or not {*shards} <= contents.commits.keys()


def _unnamed(store: Store, contents: Contents) -> list[Entry]:
    """Data objects that neither a commit nor the manifest names. Raises when one of these cannot be read."""
    named: set[str] = set()
    if contents.finished:
        manifest, _, _ = read_manifest(store)
        named |= {commit.file for commit in manifest.shards}
    commits = read_commits(store, sorted(contents.commits))
    named |= {commit.file for commit in followed(commits, "reading commits", len(contents.commits), "commits")}
    return [entry for name, entry in contents.data.items() if name not in named]


def _sorted_out(
    report: Collected, contents: Contents, unnamed: list[Entry], leftovers: list[Entry], now: float, older_than_s: float
) -> Collected:
    """The report with what can go, what must stay and what is too young; an object without a date is young."""
    garbage, uncommitted, young = [], [], 0
    for entry in unnamed + leftovers:
        what = _what(entry.name, contents)
        remnant = Remnant(entry.name, entry.size, now - entry.modified if entry.modified else 0.0, what, entry.modified)
        least = max(older_than_s, HALF_WRITTEN_S) if what == HALF_WRITTEN else older_than_s
        if what == UNCOMMITTED:
            uncommitted.append(remnant)
        elif entry.modified and remnant.age_s >= least:
            garbage.append(remnant)
        else:
            young += 1
    return replace(report, garbage=tuple(garbage), uncommitted_objects=tuple(uncommitted), young=young)


def _what(name: str, contents: Contents) -> str:
    if name not in contents.data:
        return HALF_WRITTEN
    return ORPHAN if shard_of(name) in contents.commits else UNCOMMITTED


def _delete(store: Store, garbage: Sequence[Remnant]) -> Iterator[int]:
    """Delete what is still garbage by fresh listings; yields 1 for each object that was deleted."""
    for first in range(0, len(garbage), DELETED_AT_ONCE):
        some = garbage[first : first + DELETED_AT_ONCE]
        there = {entry.name: entry.modified for entry in [*store.list("data"), *store.leftovers()]}
        for one in some:
            if there.get(one.name) != one.modified:
                continue  # gone, or written anew
            if one.what == ORPHAN and not _has_lost(store, one.name):
                continue
            store.remove(one.name)
            log.info("deleted %s/%s", store.url, one.name)
            yield 1


def _has_lost(store: Store, name: str) -> bool:
    """Whether its shard has a commit now, and that names another object. Raises when it cannot be read."""
    try:
        return read_commit(store, shard_of(name)).file != name
    except NotFound:
        return False
