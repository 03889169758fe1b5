from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from common.errors import DataError
from precompute.engine.requests import ScoreRequest, Scores
from precompute.score import ATTEMPTS, Unscored, score
from tests.precompute.rows import make_rollout

TOPK = 2
ROW = make_rollout("a/0", tokens=4)
OWN = np.arange(12, dtype=np.int32).reshape(4, 3)
STUDENT_ROW = replace(ROW, rollout_topk_ids=OWN)
GOOD = np.full(4, -1.0, np.float32)
TOP_IDS, TOP = np.zeros((4, TOPK), np.int32), np.full((4, TOPK), -0.7, np.float32)
UNSOUND = {
    "none": None,
    "nan": np.array([-1, np.nan, -1, -1], np.float32),
    "infinite": np.array([-1, -np.inf, -1, -1], np.float32),
    "too short": GOOD[:3],
    "too long": np.full(5, -1.0, np.float32),
    "a column of its own": GOOD[:, None],
    "positive": np.array([-1, 0.5, -1, -1], np.float32),
}
UNSOUND_TOP = {
    "none": (None, None),
    "no ids": (None, TOP),
    "no log-probs": (TOP_IDS, None),
    "nan": (TOP_IDS, np.where(np.arange(8).reshape(4, 2) == 3, np.float32(np.nan), TOP)),
    "infinite": (TOP_IDS, np.where(np.arange(8).reshape(4, 2) == 7, np.float32(-np.inf), TOP)),
    "positive": (TOP_IDS, np.where(np.arange(8).reshape(4, 2) == 0, np.float32(0.5), TOP)),
    "too few": (TOP_IDS[:, :1], TOP[:, :1]),
    "too many": (np.zeros((4, 3), np.int32), np.full((4, 3), -0.7, np.float32)),
    "too few ids": (TOP_IDS[:, :1], TOP),
    "too short": (TOP_IDS[:3], TOP[:3]),
}
WRONG = [pytest.param((column, None, None), 0, id=name) for name, column in UNSOUND.items()]
WRONG += [pytest.param((GOOD, *top), TOPK, id=f"top-k: {name}") for name, top in UNSOUND_TOP.items()]
Answer = tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]


class Faulty:
    """A scorer that answers a row with `unsound` the first `failures` times it sees it, through a window of one."""

    def __init__(self, unsound: Answer, failures: int, bad: str = "a/0") -> None:
        self.unsound, self.failures, self.bad = unsound, failures, bad
        self.seen: Counter[str] = Counter()
        self.asked: list[ScoreRequest] = []

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        for request in requests:
            self.asked.append(request)
            self.seen[request.uid] += 1
            if request.uid == self.bad and self.seen[request.uid] <= self.failures:
                yield Scores(request.key, *self.unsound)
            else:
                tokens = len(request.completion_ids)
                ids = np.zeros((tokens, TOPK), np.int32) if request.topk_ids is None else request.topk_ids
                yield Scores(
                    request.key, np.full(tokens, -1, np.float32), ids, np.full((tokens, TOPK), -0.7, np.float32)
                )


@pytest.mark.parametrize(("unsound", "topk"), WRONG)
def test_unsound_scores_are_asked_for_again(unsound: Answer, topk: int) -> None:
    engine = Faulty(unsound, failures=ATTEMPTS - 1)
    [(_, graded)] = score(engine, [Unscored(0, 0, ROW)], topk=topk)
    assert graded.teacher_logprobs is not None
    assert graded.teacher_logprobs.tolist() == GOOD.tolist()
    assert engine.seen["a/0"] == ATTEMPTS


@pytest.mark.parametrize(("unsound", "topk"), WRONG)
def test_unsound_scores_end_in_an_error_that_names_the_row(unsound: Answer, topk: int) -> None:
    engine = Faulty(unsound, failures=ATTEMPTS)
    with pytest.raises(DataError, match="row a/0"):
        list(score(engine, [Unscored(0, 0, ROW)], topk=topk))
    assert engine.seen["a/0"] == ATTEMPTS


@pytest.mark.parametrize(("unsound", "topk"), [case for case in WRONG if case.values[1]])
def test_grades_of_the_students_top_k_are_looked_at_as_closely(unsound: Answer, topk: int) -> None:
    engine = Faulty(unsound, failures=1)
    [(_, graded)] = score(engine, [Unscored(0, 0, STUDENT_ROW)], topk=topk, support="student")
    assert engine.seen["a/0"] == 2
    assert graded.topk_logprobs is not None and graded.topk_logprobs.tolist() == TOP.tolist()


def test_the_students_most_likely_ids_are_what_the_teacher_grades() -> None:
    engine = Faulty((None, None, None), failures=0)
    [(_, graded)] = score(engine, [Unscored(0, 0, STUDENT_ROW)], topk=TOPK, support="student")
    assert engine.asked[0].topk_ids is not None and engine.asked[0].topk_ids.tolist() == OWN[:, :TOPK].tolist()
    assert graded.topk_ids is not None and graded.topk_ids.tolist() == OWN[:, :TOPK].tolist()
    assert graded.rollout_topk_ids is None


def test_the_teachers_own_top_k_is_asked_for_whatever_the_rollouts_hold() -> None:
    engine = Faulty((None, None, None), failures=0)
    [(_, graded)] = score(engine, [Unscored(0, 0, STUDENT_ROW)], topk=TOPK)
    assert engine.asked[0].topk_ids is None
    assert graded.topk_ids is not None and graded.topk_ids.tolist() == TOP_IDS.tolist()
    assert graded.rollout_topk_ids is None


def test_rollouts_without_the_students_top_k_cannot_be_graded_on_it() -> None:
    engine = Faulty((None, None, None), failures=0)
    with pytest.raises(DataError, match=r"does not hold the student's top-k \(row a/0\)"):
        list(score(engine, [Unscored(0, 0, ROW)], topk=TOPK, support="student"))


def test_every_row_is_graded_once_however_one_of_them_fails() -> None:
    rows = [Unscored(0, index, make_rollout(f"{index}/0")) for index in range(9)]
    for bad in ("0/0", "4/0", "8/0"):
        drawn = list(score(Faulty((None, None, None), failures=2, bad=bad), rows))
        assert sorted(unscored.row for unscored, _ in drawn) == list(range(9))
        assert all(unscored.rollout.uid == graded.uid for unscored, graded in drawn)


def test_a_failed_row_does_not_wait_for_the_rest_of_the_dataset() -> None:
    rows = [Unscored(index, 0, make_rollout(f"{index}/0")) for index in range(100)]
    order = [unscored.shard for unscored, _ in score(Faulty((None, None, None), failures=1, bad="0/0"), rows)]
    assert order[0] == 0


def test_grades_leave_the_rest_of_a_rollout_alone() -> None:
    [(_, graded)] = score(Faulty((None, None, None), failures=0), [Unscored(0, 0, ROW)], topk=TOPK)
    assert graded.completion_ids is ROW.completion_ids
    assert graded.rollout_logprobs is ROW.rollout_logprobs
