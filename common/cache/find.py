"""`lopd cache ls`: the datasets under a prefix, the unfinished and the broken ones too."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from common.cache.contents import Contents, find_datasets, missing_data
from common.cache.tally import Tally, count_commits
from common.errors import DataError, LopdError, UsageError
from common.plans import Plan
from common.progress import followed, size
from common.records import read_manifest, read_plan
from common.report import Table
from common.storage import NotFound, Store
from common.terminal import say, say_table
from common.urls import is_url

PARALLEL_DATASETS = 8
COMMITS_READ = 64
"""Commits of an unfinished dataset that are read for its counts; of more, so many are a sample."""
State = Literal["complete", "unfinished", "damaged"]
STYLES: dict[State, str] = {"complete": "", "unfinished": "yellow", "damaged": "red"}


@dataclass(frozen=True)
class Found:
    """One dataset of a listing; what its records do not tell, because they are broken, is None."""

    path: str
    """Below the listed prefix; empty for the prefix itself."""
    url: str
    state: State
    """By the listing alone where it cannot be read."""
    problem: str | None
    """Why it is damaged or cannot be read."""
    shards_committed: int
    bytes: int
    """All that is stored, orphans included."""
    kind: str | None = None
    model: str | None = None
    teacher: str | None = None
    shards: int | None = None
    rows: int | None = None
    tokens: int | None = None
    estimated: bool = False
    """Whether rows and tokens are projected from a sample of the commits."""
    owner: str | None = None
    created: str | None = None
    overrides: tuple[str, ...] = ()
    manifest_sha256: str | None = None
    readable: bool = True
    """False where the store did not give a record: that is no damage, and tells nothing of the dataset."""


def find(url: str) -> list[Found]:
    """What lies under `url`, sorted by path; a dataset that cannot be read is an entry that says why.

    Raises:
        LopdError: the prefix itself cannot be listed.
    """
    store = Store(url)
    require_place(store)
    places = find_datasets(store)
    with ThreadPoolExecutor(PARALLEL_DATASETS, thread_name_prefix="ls") as threads:
        described = threads.map(lambda contents: _describe(store, contents), places)
        return list(followed(described, f"reading {store.url}", len(places), "datasets"))


def require_place(store: Store) -> None:
    """Refuse a folder of this machine that is not there; in an object store every prefix is."""
    if not is_url(store.url) and not Path(store.url).is_dir():
        raise UsageError("there is no such folder", where=store.url, fix="Check the path, or write s3://bucket/prefix")


def show(found: Sequence[Found], url: str) -> None:
    """The datasets as a table."""
    if not found:
        say(f"no dataset under {Store(url).url}")
        return
    header = ("dataset", "kind", "state", "model", "teacher", "rows", "tokens", "size", "owner", "created", "overrides")
    rows = [_cells(one) for one in found]
    styles = {index: STYLES[one.state] if one.readable else "red" for index, one in enumerate(found)}
    say_table(Table(header, rows), styles, right=(5, 6, 7))


def _describe(prefix: Store, contents: Contents) -> Found:
    store = prefix.child(contents.path) if contents.path else prefix
    bare = Found(contents.path, store.url, "damaged", None, len(contents.commits), contents.bytes)
    plan: Plan | None = None
    try:
        plan = read_plan(store)
        if contents.finished:
            return _finished(bare, plan, contents, store)
        return _unfinished(bare, plan, count_commits(store, contents, COMMITS_READ))
    except LopdError as error:
        readable = isinstance(error, (DataError, NotFound))
        state = "damaged" if readable else "complete" if contents.finished else "unfinished"
        where = error.where.removeprefix(f"{store.url}/")
        problem = f"{where}: {error.what}" if where != error.where else error.what
        return _with_plan(bare, plan, state=state, problem=problem, readable=readable)


def _finished(bare: Found, plan: Plan, contents: Contents, store: Store) -> Found:
    manifest, _, digest = read_manifest(store)
    problem = missing_data(manifest.shards, contents)
    return _with_plan(
        bare,
        plan,
        state="damaged" if problem else "complete",
        problem=problem,
        rows=manifest.rows,
        tokens=manifest.tokens,
        manifest_sha256=digest,
    )


def _unfinished(bare: Found, plan: Plan, tally: Tally) -> Found:
    return _with_plan(
        bare,
        plan,
        state="damaged" if tally.problem else "unfinished",
        problem=tally.problem,
        rows=tally.rows,
        tokens=tally.tokens,
        estimated=tally.estimated,
    )


def _with_plan(bare: Found, plan: Plan | None, **known: Any) -> Found:
    if plan is not None:
        known |= {
            "kind": plan["kind"],
            "model": plan["policy"]["name"],
            "teacher": plan["teacher"]["name"] if plan["teacher"] else None,
            "shards": plan["shards"],
            "owner": plan["created"]["owner"],
            "created": plan["created"]["at"],
            "overrides": tuple(plan["overrides"]),
        }
    return replace(bare, **known)


def _cells(one: Found) -> tuple[str, ...]:
    return (
        one.path or ".",
        one.kind or "?",
        _state(one),
        one.model or "?",
        one.teacher or "-",
        _count(one.rows, one.estimated),
        _count(one.tokens, one.estimated),
        size(one.bytes),
        one.owner or "?",
        (one.created or "?")[:16].replace("T", " "),
        ", ".join(one.overrides) or "-",
    )


def _state(one: Found) -> str:
    if not one.readable:
        return f"unreadable: {one.problem}"
    if one.state == "unfinished":
        whole = ", no manifest" if one.shards_committed == one.shards else ""
        return f"{one.shards_committed}/{one.shards} shards{whole}"
    return one.state if one.problem is None else f"{one.state}: {one.problem}"


def _count(number: int | None, estimated: bool) -> str:
    return "?" if number is None else f"{'≈' if estimated else ''}{number:,}"
