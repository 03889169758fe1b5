"""`lopd cache status`: how far a dataset is, how fast it grows, and how to go on with it."""

import shlex
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from common.cache.contents import Contents, list_contents, missing_data, orphan_count
from common.cache.resume import fill_in, resume_command
from common.cache.tally import Tally, count_commits
from common.errors import DataError
from common.pace import Pace, pace_of
from common.progress import duration, size, waiting
from common.records import PLAN, REBUILD, commit_key, read_manifest, read_plan
from common.storage import NotFound, Store
from common.terminal import say, say_facts

COMMITS_READ = 1024
"""Commits read for the counts of an unfinished dataset; of more, so many are a sample, unless all are asked for."""
State = Literal["complete", "unfinished", "damaged"]
Activity = Literal["running", "stalled", "not started"]
STYLES = {"complete": "green", "running": "", "stalled": "yellow", "not started": "yellow", "damaged": "red"}


@dataclass(frozen=True)
class Status:
    """One dataset, finished or not."""

    url: str
    state: State
    activity: Activity | None
    """Of a dataset without a manifest."""
    problem: str | None
    """Why it is damaged."""
    advice: str | None
    """What to do about that."""
    kind: str
    model: str
    teacher: str | None
    owner: str
    created: str
    overrides: tuple[str, ...]
    shards: int
    shards_committed: int
    rows: int
    tokens: int
    estimated: bool
    """Whether rows and tokens are projected from a sample of the commits."""
    bytes: int
    orphans: int
    pace: Pace
    eta_s: float | None
    resume: str | None
    """The command that goes on with it; None when it is finished."""
    fill_in: str | None
    """What the word in CAPITALS in that command stands for."""
    manifest_sha256: str | None

    @property
    def tokens_per_shard(self) -> float:
        """Completion tokens, on average."""
        return self.tokens / self.shards_committed if self.shards_committed else 0.0


def status(url: str, full: bool = False, now: float | None = None) -> Status:
    """How far the dataset at `url` is. Shards are counted by listing; commits are read for rows and tokens alone.

    Args:
        full: read every commit, however many.
        now: seconds since the epoch; this machine's clock unless given. A status may be asked for by those who must
            not write, so the store's clock, which is read by writing, is not asked.

    Raises:
        DataError: there is no dataset, or its records are altered.
    """
    store = Store(url)
    contents = list_contents(store)
    try:
        plan = read_plan(store)
    except NotFound:
        raise DataError("there is no dataset here", where=store.url, fix="Try `lopd cache ls` above it") from None
    pace = _pace_now(contents, time.time() if now is None else now)
    left = plan["shards"] - len(contents.commits)
    rate = None if contents.finished or pace.stalled else pace.recent or pace.overall
    return Status(
        url=store.url,
        activity=None if contents.finished else _activity(contents, pace),
        kind=plan["kind"],
        model=plan["policy"]["name"],
        teacher=plan["teacher"]["name"] if plan["teacher"] else None,
        owner=plan["created"]["owner"],
        created=plan["created"]["at"],
        overrides=tuple(plan["overrides"]),
        shards=plan["shards"],
        shards_committed=len(contents.commits),
        **_counted(store, contents, full),
        bytes=contents.bytes,
        orphans=orphan_count(contents),
        pace=pace,
        eta_s=60 * left / rate if rate else None,
        resume=None if contents.finished else resume_command(plan, store.url),
        fill_in=None if contents.finished else fill_in(plan),
    )


def show(found: Status) -> None:
    """The status for people."""
    say(
        f"{found.url}: {_headline(found)}",
        STYLES[found.activity if found.state == "unfinished" and found.activity else found.state],
    )
    if found.problem:
        say(f"{found.problem}. {found.advice}", "red")
    about = "≈" if found.estimated else ""
    facts = [
        ("kind", found.kind),
        ("model", found.model),
        ("teacher", found.teacher or "-"),
        ("begun", f"{found.created} by {found.owner}"),
        ("shards", f"{found.shards_committed:,} of {found.shards:,}"),
        ("rows", f"{about}{found.rows:,}"),
        ("completion tokens", f"{about}{found.tokens:,}"),
        ("stored", f"{size(found.bytes)}, {found.orphans} orphans" if found.orphans else size(found.bytes)),
        ("pace", _pace(found.pace.recent, found.tokens_per_shard)),
        ("pace overall", _pace(found.pace.overall, found.tokens_per_shard)),
        ("last commit", _date(found.pace.last) if found.pace.last else "-"),
        ("time left", duration(found.eta_s) if found.eta_s is not None else "-"),
        ("overrides", ", ".join(found.overrides) or "-"),
    ]
    facts += [("manifest sha256", found.manifest_sha256)] if found.manifest_sha256 else []
    say_facts(facts)
    if found.resume and found.fill_in:
        say(f"To go on: {found.resume}")
        say(f"where {found.fill_in}; if this is a copy that was cut off: the same `lopd cache copy` command again")
    if found.orphans:
        say(f"To see the orphans: {shlex.join(['lopd', 'cache', 'gc', found.url])}")


def _pace_now(contents: Contents, now: float) -> Pace:
    begun = contents.records[PLAN].modified if PLAN in contents.records else 0.0
    pace = pace_of(begun, [entry.modified for entry in contents.commits.values()], now)
    return replace(pace, stalled=pace.stalled and not contents.finished)


def _counted(store: Store, contents: Contents, full: bool) -> dict[str, Any]:
    if contents.finished:
        with waiting(f"reading {store.url}"):
            manifest, _, digest = read_manifest(store)
        problem = missing_data(manifest.shards, contents)
        return {
            "state": "damaged" if problem else "complete",
            "problem": problem,
            "advice": REBUILD if problem else None,
            "rows": manifest.rows,
            "tokens": manifest.tokens,
            "estimated": False,
            "manifest_sha256": digest,
        }
    tally = count_commits(store, contents, None if full else COMMITS_READ, progress=True)
    return {
        "state": "damaged" if tally.problem else "unfinished",
        "problem": tally.problem,
        "advice": _advice(tally),
        "rows": tally.rows,
        "tokens": tally.tokens,
        "estimated": tally.estimated,
        "manifest_sha256": None,
    }


def _advice(tally: Tally) -> str | None:
    """A commit is for ever, so a worker does not make its shard again until somebody removes it."""
    if not tally.lost:
        return None
    keys = ", ".join(commit_key(shard) for shard in tally.lost)
    return f"Have {keys} removed by one who may, while no gc runs; the same command then makes them anew"


def _activity(contents: Contents, pace: Pace) -> Activity:
    if pace.stalled:
        return "stalled" if contents.commits else "not started"
    return "running"


def _headline(found: Status) -> str:
    if found.state == "complete":
        return f"complete, {found.rows:,} rows"
    if found.state == "damaged" and found.manifest_sha256:
        return "damaged"
    share = f"{found.shards_committed}/{found.shards} shards ({found.shards_committed / found.shards:.0%})"
    if found.shards_committed == found.shards:
        return f"{share}, no manifest yet"
    if found.activity == "stalled" and found.pace.last is not None:
        return f"{share}, stalled since {_date(found.pace.last)}"
    return f"{share}, {found.activity}"


def _pace(shards_a_minute: float | None, tokens_per_shard: float) -> str:
    if shards_a_minute is None:
        return "-"
    return f"{shards_a_minute:.2f} shards/min, {shards_a_minute * tokens_per_shard:,.0f} tokens/min"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
