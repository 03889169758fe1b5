"""`lopd cache verify`: is everything in this dataset what its records say, and what its kind must be?

Fast: the seals of all records, manifest against plan against commits, the listing against the commits. Full: every
shard is downloaded too, whatever a local cache holds, and every row of it checked. All findings are told, not the first
alone.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from common.alignment import Shifts, require_aligned
from common.cache.contents import list_contents
from common.cache.findings import Finding, Findings, OutOfReach
from common.cache.record_checks import Records, check_listing, check_records, left_out, strangers
from common.cache.shard_checks import ShardReport, check_shard
from common.cache.transfer import in_parallel
from common.errors import DataError, LopdError
from common.progress import BYTES, Progress, size
from common.records import Commit
from common.storage import Store
from common.terminal import say

SHARDS_AT_ONCE = 4
ROWS_NAMED = 3
"""Rows that a finding names."""


@dataclass(frozen=True)
class Verdict:
    """What a verification came to."""

    url: str
    mode: str
    """`fast` or `full`."""
    state: Literal["complete", "unfinished", "damaged"]
    shards: int | None
    """That the plan has; None where it cannot be read."""
    shards_committed: int
    rows: int
    tokens: int
    bytes: int
    rows_rejected: int
    """Rows that nobody could make, as the commits say."""
    manifest_sha256: str | None
    findings: tuple[Finding, ...]
    unread: tuple[Finding, ...]
    """What the store did not give, and why; of that nothing is known."""
    failure: LopdError | None
    """The error that stands for it."""
    notes: tuple[str, ...]
    """What harms nobody, and somebody may want to know: files that are none of the dataset's, rows left out."""

    @property
    def sound(self) -> bool:
        """Whether everything was checked, and nothing found."""
        return not self.findings and not self.unread


def verify(url: str, full: bool) -> Verdict:
    """Check the dataset at `url`, finished or not.

    Raises:
        DataError: there is no dataset.
        LopdError: the store does not even list it.
    """
    store = Store(url)
    contents = list_contents(store)
    if not contents.records and not contents.commits:
        raise DataError("there is no dataset here", where=store.url, fix="Try `lopd cache ls` above it")
    findings, records = Findings(store), Records()
    with suppress(OutOfReach):  # the findings know of it; what was found before is told
        check_records(store, contents, records, findings)
        there = check_listing(contents, records, findings)
        if full:
            _check_shards(store, records, [records.commits[shard] for shard in sorted(there)], findings)
    damaged, shards = bool(findings.all()), records.plan["shards"] if records.plan is not None else None
    if not contents.finished and shards is not None:
        findings.add("dataset", f"it is not finished: {len(contents.commits)} of {shards} shards are committed")
    return Verdict(
        url=store.url,
        mode="full" if full else "fast",
        state="damaged" if damaged else "complete" if contents.finished else "unfinished",
        shards=shards,
        shards_committed=len(records.commits),
        rows=sum(commit.rows for commit in records.commits.values()),
        tokens=sum(commit.tokens for commit in records.commits.values()),
        bytes=sum(commit.bytes for commit in records.commits.values()),
        manifest_sha256=records.manifest_sha256,
        findings=findings.all(),
        unread=findings.unread(),
        failure=findings.failure,
        rows_rejected=sum(len(commit.rejected) for commit in records.commits.values()),
        notes=(*strangers(contents, records), *left_out(records)),
    )


def as_json(verdict: Verdict) -> dict[str, Any]:
    """The verdict for programs."""
    told = asdict(replace(verdict, failure=None))
    del told["failure"]
    return told | {"sound": verdict.sound}


def show(verdict: Verdict) -> None:
    """The verdict for people: a line for each finding, and one that says what was checked."""
    for finding in verdict.findings:
        say(str(finding), "red")
    for unread in verdict.unread:
        say(f"not checked: {unread}", "yellow")
    for note in verdict.notes:
        say(f"note: {note}", "yellow")
    checked = "every row checked" if verdict.mode == "full" else "records and sizes checked, rows not"
    checked = f"{len(verdict.unread)} objects could not be read" if verdict.unread else checked
    what = f"{verdict.shards_committed} shards, {verdict.rows:,} rows, {verdict.tokens:,} tokens, {size(verdict.bytes)}"
    found = f"{len(verdict.findings)} findings" if verdict.findings else "sound" if verdict.sound else "no verdict"
    say(f"{verdict.url}: {found}; {what}; {checked}", "green" if verdict.sound else "red")
    if verdict.manifest_sha256:
        say(f"manifest sha256 {verdict.manifest_sha256}")


def _check_shards(store: Store, records: Records, commits: Sequence[Commit], findings: Findings) -> None:
    """Every shard, several at a time, and then what only all of them together tell."""

    def check(commit: Commit) -> tuple[Commit, ShardReport]:
        return commit, check_shard(store, records.plan, commit)

    uids: dict[int, np.ndarray] = {}
    shifts: Shifts | None = None
    with Progress("verifying", sum(commit.bytes for commit in commits), BYTES, brief=True) as progress:
        for commit, report in in_parallel(check, commits, SHARDS_AT_ONCE):
            _add(report, findings)
            uids[report.shard] = np.concatenate([np.empty(0, np.uint64), *report.uids])
            if report.shifts is not None:
                shifts = report.shifts if shifts is None else shifts + report.shifts
            progress.advance(commit.bytes, commit.bytes)
    _check_uids(uids, findings)
    if shifts is not None:
        try:
            require_aligned(shifts.alignment, store.url)
        except LopdError as error:
            findings.add_error(error, "dataset")


def _add(report: ShardReport, findings: Findings) -> None:
    where = f"shard {report.shard}"
    for error in report.errors:
        findings.add_error(error, where)
    for problem, rows in report.bad_rows.items():
        some = ", ".join(rows[:ROWS_NAMED]) + (f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else "")
        findings.add(where, f"{problem}: row {some}")


def _check_uids(uids: dict[int, np.ndarray], findings: Findings) -> None:
    """No uid stands twice in the dataset; within a row group, the row checks have seen to it."""
    shards = sorted(uids)
    hashes = np.concatenate([uids[shard] for shard in shards] or [np.empty(0, np.uint64)])
    shard_of_row = np.repeat(np.asarray(shards, np.int64), [len(uids[shard]) for shard in shards])
    order = np.argsort(hashes, kind="stable")
    equal = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    pairs = Counter((int(shard_of_row[order[at]]), int(shard_of_row[order[at + 1]])) for at in equal)
    for (first, second), count in sorted(pairs.items()):
        twice = "stand twice" if first == second else f"are those of rows in shard {first}"
        findings.add(f"shard {second}", f"{count} uids {twice}")
