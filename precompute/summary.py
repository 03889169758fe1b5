"""What a phase came to, from its plan and commits alone: rows kept of those asked for, and how they look."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.filtered import dropped, total
from common.records import Commit
from common.rejected import rejected_lines
from common.report import Table


def summary(plan: Mapping[str, Any], commits: Sequence[Commit]) -> Table:
    """A line for each thing worth knowing; what no commit tells is left out.

    Args:
        commits: of all shards, or of those that are there so far.
    """
    stats = [commit.stats for commit in commits]
    rows, tokens = sum(commit.rows for commit in commits), sum(commit.tokens for commit in commits)
    lost, rejected = dropped(stats), [row for commit in commits for row in commit.rejected]
    made = rows + sum(lost.values())
    lines = [
        ("rows kept", f"{_of(rows, made + len(rejected))} asked for, {len(commits):,} of {plan['shards']:,} shards"),
        *[("dropped", f"{_of(count, made)} made, {words}") for words, count in lost.items()],
        *[("rejected", line) for line in rejected_lines(rejected)],
        *_verdicts(stats),
        *_truncation(stats, rows, made),
        *_lengths(commits, rows, tokens),
        *_logprobs(stats, tokens),
    ]
    moved = [one["self_test"] for one in stats if "self_test" in one]
    if moved:
        lines.append(("self-test", f"{max(moved):.2g} nats at most, by its company in a batch"))
    return Table((plan["kind"], ""), lines)


def _verdicts(stats: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    judged, correct, failed = (
        round(total(stats, name) or 0) for name in ("judged", "judged_correct", "verifier_failed")
    )
    lines = [("verifier", f"{_of(correct, judged)} judged are correct")] if judged else []
    return [*lines, *([("verifier failed", f"on {_of(failed, judged)}: no verdict")] if failed else [])]


def _truncation(stats: Sequence[Mapping[str, float]], rows: int, made: int) -> list[tuple[str, str]]:
    """Of the rows made where those cut off were dropped, else of the rows kept: other filters drop some unseen."""
    kept, left_out = total(stats, "truncated"), total(stats, "dropped_truncated")
    if kept is None or not made:
        return []
    if left_out is not None:
        return [("cut off at the token limit", f"{_of(round(kept + left_out), made)} made")]
    return [("cut off at the token limit", f"{_of(round(kept), rows)} kept")] if rows else []


def _lengths(commits: Sequence[Commit], rows: int, tokens: int) -> list[tuple[str, str]]:
    if not rows:
        return []
    prompt = sum(commit.prompt_tokens for commit in commits) / rows
    return [("mean length", f"{tokens / rows:,.1f} tokens a completion, {prompt:,.1f} a prompt")]


def _logprobs(stats: Sequence[Mapping[str, float]], tokens: int) -> list[tuple[str, str]]:
    rollout, teacher = total(stats, "rollout_logprob_sum"), total(stats, "teacher_logprob_sum")
    if rollout is None or not tokens:
        return []
    lines = [("mean rollout log-prob", f"{rollout / tokens:.4f} nats a token")]
    if teacher is not None:
        lines.append(("mean gap, teacher minus rollout", f"{(teacher - rollout) / tokens:+.4f} nats a token"))
    return lines


def _of(count: int, whole: int) -> str:
    """`9 of 12 (75.0%)`."""
    return f"{count:,} of {whole:,}" + (f" ({count / whole:.1%})" if whole else "")
