"""The thorough half of a verification: every row of a shard, decoded within what its commit announces."""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from common.alignment import Shifts, measure_shifts, require_aligned
from common.cache.statistics import TRUNCATED
from common.dataset import shard_bytes
from common.errors import DataError, LopdError
from common.parquet import iter_row_groups
from common.parquet_limits import Announced
from common.plans import Plan
from common.records import Commit
from common.schema import Rollout, check_table, to_rows, uid_of, widths_in
from common.storage import Store

SUM_SLACK = 1e-3
"""By how much k probabilities may add up to more than 1: each log-prob is rounded, and accepted a little above 0."""
SAME_NATS = 1e-3
"""Two log-probs of one token from one forward pass differ by less, in nats."""
SUMMED = {"truncated", "rollout_logprob_sum", "teacher_logprob_sum"}
"""Statistics of a commit that its rows add up to."""
OF_RANK = (NOT_SORTED, MISSING) = ("the top-k is not sorted", "the sampled token is missing in the top-k")
"""What is wrong only with the most likely tokens of the model that graded them."""
SAME_SUM = 1e-6
"""By how much of itself a sum may differ that was added up in another order."""


@dataclass
class ShardReport:
    """What was found in one shard, and what its rows add to the judgement of the dataset."""

    shard: int
    errors: list[LopdError] = field(default_factory=list)
    bad_rows: dict[str, list[str]] = field(default_factory=dict)
    """Uids of the rows with a problem, by the problem."""
    shifts: Shifts | None = None
    uids: list[np.ndarray] = field(default_factory=list)
    """(rows,) uint64 each: a hash of the uid of every row that keeps the contract."""
    stats: Counter[str] = field(default_factory=Counter)
    """What its rows add up to, by the names that commits have for it."""

    def add(self, shifts: Shifts) -> None:
        """Some rows more for the alignment."""
        self.shifts = shifts if self.shifts is None else self.shifts + shifts


def check_shard(store: Store, plan: Plan | None, commit: Commit) -> ShardReport:
    """Download one shard and check all of it: hash, pages, schema, counts, every row, alignment and top-k.

    Without a plan nobody knows what its rows must be; then the hash alone is checked.

    Memory: the shard's bytes and one row group decoded. A row group with a row that breaks the contract is reported by
    its first one, and the next row group is looked at.
    """
    report, where = ShardReport(commit.shard), f"{store.url}/{commit.file}"
    try:
        data = shard_bytes(store, commit)
        if plan is None:
            return report
        announced = Announced(commit.rows, commit.prompt_tokens, commit.tokens, *widths_in(plan))
        for table in iter_row_groups(data, announced, where):
            _check_row_group(table, plan, where, report)
        _check_rejected(commit, report)
        if report.shifts is not None:
            require_aligned(report.shifts.alignment, where)
        _check_stats(commit, report, where)
    except LopdError as error:
        report.errors.append(error)
    return report


def topk_problem(row: Rollout, ranked: bool = True) -> str | None:
    """What is wrong with the k tokens the teacher graded at the first bad position of a row; None when all is well.

    They must be distinct, no more likely together than certain, and have the sampled token's own log-prob where it is
    among them. `ranked` ones are the teacher's most likely: sorted, and more likely than a sampled token that is not
    among them. The student's are in its own order.
    """
    ids, logprobs, sampled = row.topk_ids, row.topk_logprobs, row.teacher_logprobs
    assert ids is not None and logprobs is not None and sampled is not None, "the row was checked before"
    among = ids == row.completion_ids[:, None]  # (tokens, k)
    own = np.where(among, logprobs, -np.inf).max(axis=1)  # (tokens,), -inf where the sampled token is not among them
    bad = {
        "the top-k names a token twice": (np.diff(np.sort(ids, axis=1), axis=1) == 0).any(axis=1),
        NOT_SORTED: (np.diff(logprobs, axis=1) > 0).any(axis=1),
        "the top-k adds up to more than 1": np.exp(logprobs.astype(np.float64)).sum(axis=1) > 1 + SUM_SLACK,
        "the sampled token has another log-prob in the top-k": among.any(axis=1) & (np.abs(own - sampled) > SAME_NATS),
        MISSING: ~among.any(axis=1) & (sampled > logprobs[:, -1] + SAME_NATS),
    }
    if not ranked:
        bad = {problem: positions for problem, positions in bad.items() if problem not in OF_RANK}
    return next((problem for problem, positions in bad.items() if positions.any()), None)


def _check_row_group(table: pa.Table, plan: Plan, where: str, report: ShardReport) -> None:
    scored = plan["kind"] == "scored"
    try:
        check_table(table, vocab_size=plan["vocab_size"], scored=scored, where=where)
    except LopdError as error:
        report.errors.append(error)
        return
    report.uids.append(_hashes(table["uid"].to_pylist()))
    rows = to_rows(table)
    _add_stats(rows, report)
    for row in rows:
        named = row.uid == uid_of(row.prompt_id, row.sample_idx)
        problems = [None if named else "the uid is not that of its prompt and sample"]
        problems += [topk_problem(row, ranked=plan.get("topk_support") != "student")] if plan["topk"] else []
        for problem in problems:
            if problem is not None:
                report.bad_rows.setdefault(problem, []).append(row.uid)
    if scored:
        teacher = [row.teacher_logprobs for row in rows if row.teacher_logprobs is not None]
        report.add(measure_shifts([row.rollout_logprobs for row in rows], teacher))


def _add_stats(rows: Sequence[Rollout], report: ShardReport) -> None:
    for row in rows:
        report.stats["truncated"] += row.finish_reason == TRUNCATED
        report.stats["rollout_logprob_sum"] += row.rollout_logprobs.sum(dtype=np.float64)
        if row.teacher_logprobs is not None:
            report.stats["teacher_logprob_sum"] += row.teacher_logprobs.sum(dtype=np.float64)


def _check_rejected(commit: Commit, report: ShardReport) -> None:
    """No row is rejected twice, or there after all."""
    rejected = [row.uid for row in commit.rejected]
    there = set(np.concatenate([np.empty(0, np.uint64), *report.uids]).tolist())
    for problem, uids in {
        "it is rejected twice": [uid for uid, count in Counter(rejected).items() if count > 1],
        "it is rejected, and there": [uid for uid in rejected if int(_hashes([uid])[0]) in there],
    }.items():
        if uids:
            report.bad_rows[problem] = uids


def _check_stats(commit: Commit, report: ShardReport, where: str) -> None:
    """What the commit says of its rows, and the card of the dataset; statistics of other names are not judged."""
    if report.errors:
        return
    for name in sorted(SUMMED & commit.stats.keys()):
        said, found = commit.stats[name], report.stats[name]
        if not math.isclose(said, found, rel_tol=SAME_SUM, abs_tol=SAME_SUM):
            report.errors.append(DataError(f"the commit says {name} {said:g}, its rows have {found:g}", where=where))


def _hashes(uids: Sequence[str]) -> np.ndarray:
    """(rows,) uint64; two different uids of ten million share one with a chance of 3 in a million."""
    digests = b"".join(hashlib.blake2b(uid.encode(), digest_size=8).digest() for uid in uids)
    return np.frombuffer(digests, np.uint64)
