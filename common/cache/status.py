"""`lopd cache status`: how far a dataset is, how fast it grows, and how to go on with it."""

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from common.cache.contents import Contents, list_contents, orphan_count
from common.cache.pace import Pace, pace_of
from common.cache.tally import count_commits
from common.errors import DataError
from common.plans import Plan
from common.progress import duration, size, waiting
from common.records import PLAN, read_manifest, read_plan
from common.storage import NotFound, Store
from common.terminal import say, say_facts

COMMITS_READ = 1024
"""Commits read for the counts of an unfinished dataset; of more, so many are a sample, unless all are asked for."""
State = Literal["complete", "running", "stalled", "not started"]
STYLES: dict[State, str] = {"complete": "green", "running": "", "stalled": "yellow", "not started": "yellow"}


@dataclass(frozen=True)
class Status:
    """One dataset, finished or not."""

    url: str
    state: State
    kind: str
    model: str
    teacher: str | None
    owner: str
    created: str
    overrides: tuple[str, ...]
    shards: int
    committed: int
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
        return self.tokens / self.committed if self.committed else 0.0


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
        state=_state(contents, pace),
        kind=plan["kind"],
        model=plan["policy"]["name"],
        teacher=plan["teacher"]["name"] if plan["teacher"] else None,
        owner=plan["created"]["owner"],
        created=plan["created"]["at"],
        overrides=tuple(plan["overrides"]),
        shards=plan["shards"],
        committed=len(contents.commits),
        **_counts(store, contents, full),
        bytes=contents.bytes,
        orphans=orphan_count(contents),
        pace=pace,
        eta_s=60 * left / rate if rate else None,
        resume=None if contents.finished else resume_command(plan, store.url),
        fill_in=None if contents.finished else _fill_in(plan),
    )


def resume_command(plan: Plan, url: str) -> str:
    """The command that goes on with the dataset, with what the plan knows of it; words in CAPITALS are to be filled in.

    Another setting than the plan's is refused by the command itself, which then names it.
    """
    if plan["kind"] == "scored":
        teacher = plan["teacher"]["name"]
        words = ["lopd", "precompute", "score", "--rollouts", "ROLLOUTS", "--teacher", teacher]
        words += ["--topk", str(plan["topk"])] if plan["topk"] else []
        words += ["--allow-teacher-mismatch"] if "teacher-mismatch" in plan["overrides"] else []
        words += _engine_words(plan.get("scoring_engine", {}))
    else:
        verb = {"sft": "sft-data", "rollouts": "rollouts"}[plan["kind"]]
        words = ["lopd", "precompute", verb, "--model", plan["policy"]["name"], "--prompts", "PROMPTS"]
        words += [word for key, value in _settings(plan) for word in ("--set", f"{key}={value}")]
        words += _engine_words(plan.get("engine", {}))
    return shlex.join([*words, "--cache", url])


def show(found: Status) -> None:
    """The status for people."""
    say(f"{found.url}: {_headline(found)}", STYLES[found.state])
    about = "≈" if found.estimated else ""
    facts = [
        ("kind", found.kind),
        ("model", found.model),
        ("teacher", found.teacher or "-"),
        ("begun", f"{found.created} by {found.owner}"),
        ("shards", f"{found.committed:,} of {found.shards:,}"),
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
        say(f"where {found.fill_in}")
    if found.orphans:
        say(f"To see the orphans: {shlex.join(['lopd', 'cache', 'gc', found.url])}")


def _pace_now(contents: Contents, now: float) -> Pace:
    begun = contents.records[PLAN].modified if PLAN in contents.records else 0.0
    pace = pace_of(begun, [entry.modified for entry in contents.commits.values()], now)
    return replace(pace, stalled=pace.stalled and not contents.finished)


def _fill_in(plan: Plan) -> str:
    if plan["kind"] == "scored":
        return f"ROLLOUTS is the dataset whose manifest has sha256 {plan['parent']}"
    prompts = plan["prompts"]
    return f"PROMPTS are the same {prompts['count']} prompts as before, of sha256 {prompts['sha256']}"


def _counts(store: Store, contents: Contents, full: bool) -> dict[str, Any]:
    if contents.finished:
        with waiting(f"reading {store.url}"):
            manifest, _, digest = read_manifest(store)
        return {"rows": manifest.rows, "tokens": manifest.tokens, "estimated": False, "manifest_sha256": digest}
    at_most = None if full else COMMITS_READ
    tally = count_commits(store, sorted(contents.commits), at_most, progress=True)
    return {"rows": tally.rows, "tokens": tally.tokens, "estimated": tally.estimated, "manifest_sha256": None}


def _state(contents: Contents, pace: Pace) -> State:
    if contents.finished:
        return "complete"
    if pace.stalled:
        return "stalled" if contents.commits else "not started"
    return "running"


def _settings(plan: Plan) -> list[tuple[str, str]]:
    """The plan's sampling and shard size as `--set` takes them."""
    values = {f"sampling.{key}": value for key, value in sorted(plan["sampling"].items())}
    values |= {key: plan[key] for key in ("prompts_per_shard", "keep_text") if key in plan}
    return [(key, json.dumps(value)) for key, value in values.items()]


def _engine_words(engine: Mapping[str, str]) -> list[str]:
    return [
        word for key in ("dtype", "head_dtype") if key in engine for word in ("--set", f"engine.{key}={engine[key]}")
    ]


def _headline(found: Status) -> str:
    if found.state == "complete":
        return f"complete, {found.rows:,} rows"
    share = f"{found.committed}/{found.shards} shards ({found.committed / found.shards:.0%})"
    if found.committed == found.shards:
        return f"{share}, no manifest yet"
    if found.state == "stalled" and found.pace.last is not None:
        return f"{share}, stalled since {_date(found.pace.last)}"
    return f"{share}, {found.state}"


def _pace(shards_a_minute: float | None, tokens_per_shard: float) -> str:
    if shards_a_minute is None:
        return "-"
    return f"{shards_a_minute:.2f} shards/min, {shards_a_minute * tokens_per_shard:,.0f} tokens/min"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
