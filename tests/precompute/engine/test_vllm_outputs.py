"""What vLLM returns is taken only in the shape that was asked for."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from precompute.engine.requests import EngineDied, GenerateRequest, ScoreRequest, Scores
from precompute.engine.vllm_outputs import generation, scores_by_id, scores_from_prompt

IDS, OWN = np.array([7, 8, 9], np.int32), np.array([[1, 2], [3, 4], [5, 6]], np.int32)
REQUEST = ScoreRequest("key", np.array([1, 2], np.int32), IDS, "p0/0")
VALUES = -np.arange(1, 10, dtype=np.float32).reshape(3, 3)


@dataclass
class Flat:
    """As vLLM keeps log-probs: all positions one after another, and where each begins."""

    token_ids: list[int]
    logprobs: list[Any]
    start_indices: list[int]

    def __len__(self) -> int:
        return len(self.start_indices)


def flat(rows: list[list[int]], logprobs: np.ndarray | None = None) -> Flat:
    """A list a position."""
    starts = np.cumsum([0, *map(len, rows)])[:-1].tolist()
    ids = [token for row in rows for token in row]
    values = (-np.arange(1, len(ids) + 1)).tolist() if logprobs is None else logprobs.reshape(-1).tolist()
    return Flat(ids, values, starts)


def in_prompt(rows: list[list[int]] | None, topk: int = 2) -> Scores:
    return scores_from_prompt(REQUEST, SimpleNamespace(prompt_logprobs=rows and flat(rows)), topk)


def by_id(values: np.ndarray | None, own: np.ndarray | None) -> Scores:
    request = ScoreRequest("key", REQUEST.prompt_ids, IDS, "p0/0", own)
    return scores_by_id(request, SimpleNamespace(prompt_token_id_logprobs=values))


def test_given_ids_come_back_with_their_log_probs_beside_the_tokens() -> None:
    scores = by_id(VALUES, OWN)
    assert scores.logprobs is not None and scores.topk_ids is not None and scores.topk_logprobs is not None
    assert scores.logprobs.tolist() == [-1, -4, -7]
    assert scores.topk_ids.tolist() == OWN.tolist()
    assert scores.topk_logprobs.tolist() == [[-2, -3], [-5, -6], [-8, -9]]
    alone = by_id(VALUES[:, :1], None)
    assert alone.logprobs is not None and alone.logprobs.tolist() == [-1, -4, -7]
    assert alone.topk_ids is None


@pytest.mark.parametrize("values", [None, VALUES[:, :2], VALUES[:2], np.repeat(VALUES, 2, axis=1), VALUES[:, 0]])
def test_log_probs_of_another_shape_than_that_of_the_ids_are_none(values: np.ndarray | None) -> None:
    assert by_id(values, OWN).logprobs is None


def test_more_columns_than_the_token_alone_are_none() -> None:
    assert by_id(VALUES, None).logprobs is None


PROMPT = [[], [2, 0, 0]]


def test_the_completions_rows_are_taken_out_of_the_whole_prompt() -> None:
    scores = in_prompt([*PROMPT, [7, 1, 2], [8, 3, 4], [9, 5, 6]])
    assert scores.logprobs is not None and scores.topk_ids is not None and scores.topk_logprobs is not None
    assert scores.logprobs.tolist() == [-4, -7, -10]
    assert scores.topk_ids.tolist() == OWN.tolist()
    assert scores.topk_logprobs.tolist() == [[-5, -6], [-8, -9], [-11, -12]]


@pytest.mark.parametrize(
    "rows",
    [
        None,
        [*PROMPT, [7, 1, 2], [8, 3, 4]],  # a position too few
        [*PROMPT, [7, 1, 2], [8, 3, 4], [9, 5, 6], [1, 1, 1]],
        [*PROMPT, [7, 1, 2, 8], [3, 4, 9, 5, 6]],  # as many values at fewer positions
        [*PROMPT, [7, 1], [8, 3], [9, 5]],  # k too small
        [*PROMPT, [8, 1, 2], [9, 3, 4], [1, 5, 6]],  # of the tokens after
    ],
)
def test_rows_that_are_not_the_completions_are_none(rows: list[list[int]] | None) -> None:
    assert in_prompt(rows).logprobs is None


def sampled(rows: list[list[int]], logprobs: np.ndarray | None = None, reason: str = "stop", topk: int = 2) -> Any:
    completion = SimpleNamespace(finish_reason=reason, token_ids=IDS.tolist(), logprobs=flat(rows, logprobs))
    return generation(GenerateRequest("key", [1], 0, "p0/0"), SimpleNamespace(outputs=[completion]), topk)


def test_a_sample_comes_with_its_log_probs_and_the_most_likely_ids() -> None:
    found = sampled([[7, 1, 2], [8, 3, 4], [9, 5, 6]])
    assert (found.completion_ids.tolist(), found.logprobs.tolist()) == ([7, 8, 9], [-1, -4, -7])
    assert found.topk_ids is not None and found.topk_ids.tolist() == OWN.tolist()
    assert sampled([[7], [8], [9]], topk=0).topk_ids is None


@pytest.mark.parametrize("rows", [[[7, 1, 2], [8, 3, 4]], [[7, 1], [8, 3], [9, 5]], [[7, 1, 2], [3, 8, 4], [9, 5, 6]]])
def test_log_probs_of_other_tokens_than_were_sampled_are_an_error(rows: list[list[int]]) -> None:
    with pytest.raises(DataError, match=r"other tokens than it sampled \(row p0/0\)"):
        sampled(rows)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_numbers_that_broke_down_are_the_death_of_the_engine(value: float) -> None:
    with pytest.raises(EngineDied, match=r"no numbers \(row p0/0\)"):
        sampled([[7], [8], [9]], np.array([-1, value, -1]), topk=0)


@pytest.mark.parametrize("reason", ["abort", "error", "repetition"])
def test_a_request_that_was_given_up_is_no_completion(reason: str) -> None:
    with pytest.raises(EngineDied, match=rf"gave a request up \({reason}\) \(row p0/0\)"):
        sampled([[7], [8], [9]], reason=reason, topk=0)
