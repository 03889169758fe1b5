from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from common.errors import DataError
from precompute.requests import ScoreRequest, Scores
from precompute.score import ATTEMPTS, Unscored, score
from tests.precompute.rows import make_rollout

ROW = make_rollout("a/0", tokens=4)
GOOD = np.full(4, -1.0, np.float32)
TOP_IDS, TOP = np.zeros((4, 2), np.int32), np.full((4, 2), -0.7, np.float32)
UNSOUND = {
    "none": (None, None),
    "nan": (np.array([-1, np.nan, -1, -1], np.float32), None),
    "infinite": (np.array([-1, -np.inf, -1, -1], np.float32), None),
    "too short": (GOOD[:3], None),
    "too long": (np.full(5, -1.0, np.float32), None),
    "positive": (np.array([-1, 0.5, -1, -1], np.float32), None),
    "nan in the top k": (GOOD, np.where(np.arange(8).reshape(4, 2) == 3, np.nan, TOP)),
}


class Faulty:
    """A scorer that answers a row with `unsound` the first `failures` times it sees it, through a window of one."""

    def __init__(self, unsound: tuple[np.ndarray | None, np.ndarray | None], failures: int, bad: str = "a/0") -> None:
        self.unsound, self.failures, self.bad = unsound, failures, bad
        self.seen: Counter[str] = Counter()

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        for request in requests:
            uid = request.key.rollout.uid
            self.seen[uid] += 1
            if uid == self.bad and self.seen[uid] <= self.failures:
                logprobs, top = self.unsound
                yield Scores(request.key, logprobs, None if top is None else TOP_IDS, top)
            else:
                yield Scores(request.key, np.full(len(request.completion_ids), -1.0, np.float32))


@pytest.mark.parametrize("unsound", UNSOUND.values(), ids=UNSOUND.keys())
def test_unsound_scores_are_asked_for_again(unsound: tuple[np.ndarray | None, np.ndarray | None]) -> None:
    engine = Faulty(unsound, failures=ATTEMPTS - 1)
    [(_, graded)] = score(engine, [Unscored(0, 0, ROW)])
    assert graded.teacher_logprobs is not None
    assert graded.teacher_logprobs.tolist() == GOOD.tolist()
    assert engine.seen["a/0"] == ATTEMPTS


@pytest.mark.parametrize("unsound", UNSOUND.values(), ids=UNSOUND.keys())
def test_unsound_scores_end_in_an_error_that_names_the_row(
    unsound: tuple[np.ndarray | None, np.ndarray | None],
) -> None:
    engine = Faulty(unsound, failures=ATTEMPTS)
    with pytest.raises(DataError, match="row a/0"):
        list(score(engine, [Unscored(0, 0, ROW)]))
    assert engine.seen["a/0"] == ATTEMPTS


def test_every_row_is_graded_once_however_one_of_them_fails() -> None:
    rows = [Unscored(0, index, make_rollout(f"{index}/0")) for index in range(9)]
    for bad in ("0/0", "4/0", "8/0"):
        drawn = list(score(Faulty((None, None), failures=2, bad=bad), rows))
        assert sorted(unscored.row for unscored, _ in drawn) == list(range(9))
        assert all(unscored.rollout.uid == graded.uid for unscored, graded in drawn)


def test_a_failed_row_does_not_wait_for_the_rest_of_the_dataset() -> None:
    rows = [Unscored(index, 0, make_rollout(f"{index}/0")) for index in range(100)]
    order = [unscored.shard for unscored, _ in score(Faulty((None, None), failures=1, bad="0/0"), rows)]
    assert order[0] == 0


def test_grades_leave_the_rest_of_a_rollout_alone() -> None:
    [(_, graded)] = score(Faulty((None, None), failures=0), [Unscored(0, 0, ROW)])
    assert graded.completion_ids is ROW.completion_ids
    assert graded.rollout_logprobs is ROW.rollout_logprobs
    assert graded.topk_ids is None
