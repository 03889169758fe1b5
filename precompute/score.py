"""Rollouts -> teacher log-probs of every sampled token. Pure against `requests.Scorer`."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from common.errors import DataError
from common.row_checks import MAX_LOGPROB
from common.schema import Rollout
from precompute.config import Support
from precompute.engine.requests import Scorer, ScoreRequest, Scores

ATTEMPTS = 3
"""An engine may lose a request's log-probs (an odd preemption); it is asked again so often, then it is an error."""


@dataclass(frozen=True)
class Unscored:
    """One rollout to grade, and its place."""

    shard: int
    row: int
    rollout: Rollout

    @property
    def uid(self) -> str:
        """The name of its row."""
        return self.rollout.uid


def score(
    engine: Scorer, rows: Iterable[Unscored], *, topk: int = 0, support: Support = "teacher"
) -> Iterator[tuple[Unscored, Rollout]]:
    """Grade rollouts, in the order in which they finish.

    Args:
        topk: how many further tokens are graded at each position, as the engine was built to.
        support: whose most likely tokens these are; the student's stand in the rollouts.

    Raises:
        DataError: the engine gave no, not enough, not finite or positive log-probs three times; nothing of that row
            is ever written.
    """
    given = topk if support == "student" else 0
    fresh, failed, failures = iter(rows), deque[Unscored](), Counter[tuple[int, int]]()
    while True:
        for scores in engine.score(requests_of(_failed_first(fresh, failed), given)):
            unscored: Unscored = scores.key
            place = (unscored.shard, unscored.row)
            if is_sound(scores, len(unscored.rollout.completion_ids), topk):
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


def is_sound(scores: Scores, tokens: int, topk: int) -> bool:
    """Whether every token, and each of the `topk` further ones beside it, has a finite log-prob not above 0."""
    if not _are_logprobs(scores.logprobs, (tokens,)):
        return False
    named = scores.topk_ids is not None and scores.topk_ids.shape == (tokens, topk)
    return topk == 0 or (named and _are_logprobs(scores.topk_logprobs, (tokens, topk)))


def _are_logprobs(values: np.ndarray | None, shape: tuple[int, ...]) -> bool:
    if values is None or values.shape != shape:
        return False
    return bool(np.isfinite(values).all() and (values <= MAX_LOGPROB).all())


def requests_of(rows: Iterable[Unscored], given: int = 0) -> Iterator[ScoreRequest]:
    """What the engine is asked of each row, with the first `given` of the student's most likely ids."""
    for row in rows:
        ids = _most_likely(row.rollout)[:, :given] if given else None
        yield ScoreRequest(row, row.rollout.prompt_ids, row.rollout.completion_ids, row.uid, ids)


def _most_likely(rollout: Rollout) -> np.ndarray:
    if rollout.rollout_topk_ids is None:
        raise DataError("the rollout does not hold the student's top-k", where=f"row {rollout.uid}")
    return rollout.rollout_topk_ids


def _failed_first(fresh: Iterator[Unscored], failed: deque[Unscored]) -> Iterator[Unscored]:
    """A failed row goes before the next fresh one: waiting for the end, it would keep its shard uncommitted."""
    while (row := failed.popleft() if failed else next(fresh, None)) is not None:
        yield row


def _graded(rollout: Rollout, scores: Scores) -> Rollout:
    return replace(
        rollout,
        teacher_logprobs=scores.logprobs,
        topk_ids=scores.topk_ids,
        topk_logprobs=scores.topk_logprobs,
        rollout_topk_ids=None,  # where they were asked for, they are the top-k now
    )
