from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pytest

from common.errors import DataError
from precompute.engine.requests import ScoreRequest, Scores
from precompute.score import Unscored
from precompute.self_test import batch_noise
from tests.precompute.rows import make_rollout

ROWS = [Unscored(0, index, make_rollout(f"{index}/0", tokens=4 + index)) for index in range(5)]
Grade = Callable[[ScoreRequest, Sequence[ScoreRequest]], np.ndarray]


class Scorer:
    """Grades a request by what it is and by the batch that it is part of; the last of a batch finishes first."""

    def __init__(self, grade: Grade) -> None:
        self.grade, self.batches = grade, list[list[str]]()

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        batch = list(requests)
        self.batches.append([request.uid for request in batch])
        for request in reversed(batch):
            yield Scores(request.key, self.grade(request, batch))


def alone(request: ScoreRequest, batch: Sequence[ScoreRequest]) -> np.ndarray:
    """Log-probs that depend on nothing but the sequence."""
    return -np.abs(np.sin(request.completion_ids.astype(np.float32)))


def with_size(request: ScoreRequest, batch: Sequence[ScoreRequest]) -> np.ndarray:
    return alone(request, batch) - np.float32(0.01) * len(batch)


def with_order(request: ScoreRequest, batch: Sequence[ScoreRequest]) -> np.ndarray:
    """Only who comes first in a full batch is off, at one token."""
    shift = np.zeros(len(request.completion_ids), np.float32)
    shift[2] = 0.25 if len(batch) == len(ROWS) and batch[0] is request else 0
    return alone(request, batch) - shift


def with_neighbour(request: ScoreRequest, batch: Sequence[ScoreRequest]) -> np.ndarray:
    """An engine that mixes up what it was given: the tokens of another one of the batch."""
    other = batch[(list(batch).index(request) + 1) % len(batch)]
    return np.resize(alone(other, batch), len(request.completion_ids))


def test_an_engine_whose_numbers_depend_on_nothing_else_makes_no_noise() -> None:
    assert batch_noise(Scorer(alone), ROWS) == 0.0


@pytest.mark.parametrize(
    ("grade", "least", "most"), [(with_size, 0.039, 0.041), (with_order, 0.25, 0.2501), (with_neighbour, 0.5, 10)]
)
def test_the_largest_difference_between_batches_is_told(grade: Grade, least: float, most: float) -> None:
    noise = batch_noise(Scorer(grade), ROWS)
    assert noise is not None and least <= noise <= most


def test_every_sequence_is_scored_alone_and_in_other_company_and_order() -> None:
    scorer = Scorer(alone)
    batch_noise(scorer, ROWS)
    uids = [row.uid for row in ROWS]
    for uid in uids:
        assert [uid] in scorer.batches
        assert len({tuple(batch) for batch in scorer.batches if uid in batch}) == 4
    assert uids in scorer.batches and uids[::-1] in scorer.batches


def test_one_sequence_is_compared_with_itself() -> None:
    assert batch_noise(Scorer(alone), ROWS[:1]) == 0.0


def test_of_sequences_that_the_engine_does_not_take_nothing_is_known() -> None:
    class Picky(Scorer):
        """Takes only what `taken` names."""

        def __init__(self, *taken: str) -> None:
            super().__init__(with_size)
            self.taken = taken

        def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
            return super().score(request for request in requests if request.uid in self.taken)

    assert batch_noise(Picky(), ROWS) is None
    assert batch_noise(Picky("1/0", "3/0"), ROWS) == pytest.approx(0.01, abs=1e-3)


@pytest.mark.parametrize("bad", [np.full(4, np.nan, np.float32), np.full(3, -1, np.float32), None])
def test_unsound_numbers_are_an_error_with_their_row(bad: np.ndarray | None) -> None:
    def grade(request: ScoreRequest, batch: Sequence[ScoreRequest]) -> np.ndarray:
        return bad if request.uid == "0/0" else alone(request, batch)  # type: ignore[return-value]

    with pytest.raises(DataError, match=r"no sound log-probs in its self-test \(row 0/0\)"):
        batch_noise(Scorer(grade), ROWS)
