"""What a phase tells at its end, from plan and commits alone."""

from typing import Any

from common.records import Commit
from common.rejected import Rejected
from precompute.summary import summary
from tests.common.rows import make_plan


def commit(shard: int, rows: int, rejected: tuple[str, ...] = (), **stats: float) -> Commit:
    return Commit(
        shard=shard,
        file=f"data/{shard:06d}-{'a' * 16}.parquet",
        sha256="a" * 64,
        bytes=1,
        rows=rows,
        prompt_tokens=3 * rows,
        tokens=10 * rows,
        stats=stats,
        rejected=tuple(Rejected(uid=uid, reason="engine died") for uid in rejected),
    )


def told(commits: list[Commit], **plan: Any) -> list[str]:
    table = summary(make_plan(**{"shards": len(commits), "kind": "rollouts"} | plan), commits)
    return [f"{name}: {value}" for name, value in table.rows]


def test_rollouts_without_filters_tell_yield_truncation_length_and_logprob() -> None:
    commits = [commit(shard, 4, truncated=1.0, rollout_logprob_sum=-20.0) for shard in range(2)]
    assert told(commits) == [
        "rows kept: 8 of 8 (100.0%) asked for, 2 of 2 shards",
        "cut off at the token limit: 2 of 8 (25.0%) kept",
        "mean length: 10.0 tokens a completion, 3.0 a prompt",
        "mean rollout log-prob: -0.5000 nats a token",
    ]


def test_every_filter_that_was_on_is_told_with_its_count_and_failures_of_the_verifier() -> None:
    stats = {
        "truncated": 0.0,
        "rollout_logprob_sum": -20.0,
        "dropped_truncated": 2.0,
        "dropped_loop": 0.0,
        "dropped_wrong": 1.0,
        "dropped_unverified": 1.0,
    }
    judged = {"judged": 4.0, "judged_correct": 2.0, "verifier_failed": 1.0}
    commits = [
        commit(0, 2, ("p/9",)).model_copy(update={"stats": stats | judged}),
        commit(1, 0, truncated=0.0, rollout_logprob_sum=0.0, dropped_truncated=3.0, dropped_loop=0.0),
    ]
    lines = told(commits)
    assert lines[0] == "rows kept: 2 of 10 (20.0%) asked for, 2 of 2 shards"
    for line in (
        "dropped: 5 of 9 (55.6%) made, cut off at the token limit",
        "dropped: 0 of 9 (0.0%) made, ending in a loop",
        "dropped: 1 of 9 (11.1%) made, found wrong",
        "dropped: 1 of 9 (11.1%) made, without a verdict",
        "rejected: 1 by the reason: engine died (p/9)",
        "verifier: 2 of 4 (50.0%) judged are correct",
        "verifier failed: on 1 of 4 (25.0%): no verdict",
        "cut off at the token limit: 5 of 9 (55.6%) made",
    ):
        assert line in lines


def test_scores_tell_the_gap_and_the_largest_difference_of_any_self_test() -> None:
    def scored(shard: int, self_test: float) -> Commit:
        return commit(
            shard, 4, truncated=0.0, rollout_logprob_sum=-20.0, teacher_logprob_sum=-30.0, self_test=self_test
        )

    lines = told([scored(0, 0.0), scored(1, 0.00125)], kind="scored")
    assert "mean gap, teacher minus rollout: -0.2500 nats a token" in lines
    assert lines[-1] == "self-test: 0.0013 nats at most, by its company in a batch"


def test_a_phase_that_has_committed_nothing_says_so() -> None:
    assert told([], shards=3) == ["rows kept: 0 of 0 asked for, 0 of 3 shards"]


def test_it_prints_as_a_table_of_the_kind() -> None:
    text = summary(make_plan(1, kind="sft"), [commit(0, 4)]).as_text()
    assert text.splitlines()[0] == "sft"
