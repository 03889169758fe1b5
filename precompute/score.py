"""Rollouts -> teacher log-probs of every sampled token. Pure against `requests.Scorer`."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from common.errors import DataError
from common.row_checks import MAX_LOGPROB
from common.schema import Rollout
from precompute.requests import Scorer, ScoreRequest, Scores

ATTEMPTS = 3
"""An engine may lose a request's log-probs (an odd preemption); it is asked again so often, then it is an error."""


@dataclass(frozen=True)
class Unscored:
    """One rollout to grade, and its place."""

    shard: int
    row: int
    rollout: Rollout


def score(engine: Scorer, rows: Iterable[Unscored]) -> Iterator[tuple[Unscored, Rollout]]:
    """Grade rollouts, in the order in which they finish.

    Raises:
        DataError: the engine gave no, not enough, not finite or positive log-probs three times; nothing of that row
            is ever written.
    """
    fresh, failed, failures = iter(rows), deque[Unscored](), Counter[tuple[int, int]]()
    while True:
        for scores in engine.score(_requests(fresh, failed)):
            unscored: Unscored = scores.key
            place = (unscored.shard, unscored.row)
            if is_sound(scores, len(unscored.rollout.completion_ids)):
                yield unscored, _graded(unscored.rollout, scores)
                continue
            failures[place] += 1
            if failures[place] == ATTEMPTS:
                raise DataError(
                    f"the engine gave no sound log-probs in {ATTEMPTS} attempts", where=f"row {unscored.rollout.uid}"
                )
            failed.append(unscored)
        if not failed:
            return


def is_sound(scores: Scores, tokens: int) -> bool:
    """Whether every token has a finite log-prob that is not positive."""
    columns = [scores.logprobs] if scores.topk_logprobs is None else [scores.logprobs, scores.topk_logprobs]
    return all(
        column is not None
        and len(column) == tokens
        and bool(np.isfinite(column).all())
        and bool((column <= MAX_LOGPROB).all())
        for column in columns
    )


def _requests(fresh: Iterator[Unscored], failed: deque[Unscored]) -> Iterator[ScoreRequest]:
    """Requests, a failed row before the next fresh one: waiting for the end, it would keep its shard uncommitted."""
    while (row := failed.popleft() if failed else next(fresh, None)) is not None:
        yield ScoreRequest(row, row.rollout.prompt_ids, row.rollout.completion_ids, row.rollout.uid)


def _graded(rollout: Rollout, scores: Scores) -> Rollout:
    return replace(
        rollout,
        teacher_logprobs=scores.logprobs,
        topk_ids=scores.topk_ids,
        topk_logprobs=scores.topk_logprobs,
    )
