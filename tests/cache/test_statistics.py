"""Running statistics against the same figures computed in the plainest way over all rows at once."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings

from common.cache.statistics import (
    BIN,
    FLOOR,
    QUARTILES,
    Lengths,
    Statistics,
    TokenMeans,
    position_bin,
    position_middle,
)
from common.schema import Rollout, to_table
from tests.common.rows import make_row, row_lists


def gathered(rows: Sequence[Rollout], *, at_once: int, topk: int = 0, scored: bool = True) -> Statistics:
    """Statistics of `rows`, taken in `at_once` at a time."""
    statistics = Statistics(scored=scored)
    for start in range(0, len(rows), at_once):
        statistics.add(to_table(rows[start : start + at_once], topk))
    return statistics


def made_rows(count: int = 23, topk: int = 0, scored: bool = True) -> list[Rollout]:
    lengths = np.random.default_rng(0).integers(1, 60, count)
    return [make_row(index, tokens=int(length), topk=topk, scored=scored) for index, length in enumerate(lengths)]


def gaps(row: Rollout) -> np.ndarray:
    assert row.teacher_logprobs is not None
    return row.teacher_logprobs.astype(np.float64) - row.rollout_logprobs


def ratio_error(groups: Sequence[np.ndarray]) -> float:
    """Standard error of the mean over all values in `groups`, the groups being the independent draws."""
    groups = [group for group in groups if len(group)]
    mean = np.concatenate(groups).mean()
    residuals = [group.sum() - mean * len(group) for group in groups]
    draws = len(groups)
    return math.sqrt(draws / (draws - 1) * sum(value**2 for value in residuals)) / sum(map(len, groups))


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_means_are_per_token_whatever_the_row_groups(at_once: int) -> None:
    rows = made_rows()
    found = gathered(rows, at_once=at_once).summary()

    sampled = np.concatenate([row.rollout_logprobs for row in rows]).astype(np.float64)
    assert found["rollout_logprob"]["mean"] == pytest.approx(sampled.mean())
    assert found["gap"]["mean"] == pytest.approx(np.concatenate([gaps(row) for row in rows]).mean())
    assert found["gap"]["mean"] == pytest.approx(found["teacher_logprob"]["mean"] - found["rollout_logprob"]["mean"])


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_the_standard_error_is_over_rollouts_not_tokens(at_once: int) -> None:
    rows = made_rows()
    found = gathered(rows, at_once=at_once).summary()["gap"]
    assert found["standard_error"] == pytest.approx(ratio_error([gaps(row) for row in rows]))


def test_rollouts_that_agree_within_themselves_are_not_taken_for_many_draws() -> None:
    means = TokenMeans(1)
    means.add(np.array([[100.0], [-100.0]]), np.array([[100.0], [100.0]]))  # two rollouts of 100 equal tokens
    assert means.summary() == {"mean": 0.0, "standard_error": pytest.approx(1.0)}


def test_of_one_rollout_no_standard_error_is_given() -> None:
    found = gathered(made_rows(1), at_once=1).summary()
    assert found["gap"]["standard_error"] is None and found["gap"]["mean"] is not None


def test_the_gap_by_quarter_of_the_completion() -> None:
    rows = made_rows()
    found = gathered(rows, at_once=5).summary()["gap_by_quartile"]
    for quartile in range(QUARTILES):
        of = [
            np.array([gap for index, gap in enumerate(gaps(row)) if index * QUARTILES // len(gaps(row)) == quartile])
            for row in rows
        ]
        assert found[quartile]["mean"] == pytest.approx(np.concatenate(of).mean())
        assert found[quartile]["standard_error"] == pytest.approx(ratio_error(of))


def test_a_quarter_that_no_completion_reaches_has_no_mean() -> None:
    found = gathered([make_row(index, tokens=1) for index in range(3)], at_once=3).summary()["gap_by_quartile"]
    assert [mean["mean"] is None for mean in found] == [False, True, True, True]


def test_the_gap_by_position() -> None:
    rows = made_rows()
    means = gathered(rows, at_once=5).by_position
    for place in range(60):
        at = int(position_bin(np.array([place]))[0])
        same = [
            np.array([gap for index, gap in enumerate(gaps(row)) if position_bin(np.array([index]))[0] == at])
            for row in rows
        ]
        if sum(map(len, same)):
            assert means.means()[at] == pytest.approx(np.concatenate(same).mean())
            assert means.tokens[at] == sum(map(len, same))


def test_bins_of_position_begin_with_single_tokens_and_widen() -> None:
    bins = position_bin(np.arange(5000))
    assert len(set(bins[:4])) == 4 and (np.diff(bins) >= 0).all() and np.bincount(bins).max() > 500
    assert position_middle(bins[[0, 99, 999]]) == pytest.approx([1, 100, 1000], rel=0.15)


def test_lengths_and_finish_reasons() -> None:
    rows = [
        make_row(index, tokens=index + 1, finish_reason="length" if index % 4 == 0 else "stop") for index in range(40)
    ]
    found = gathered(rows, at_once=7).summary()
    lengths = np.array([len(row.completion_ids) for row in rows])
    assert found["completion_tokens"] == {
        "mean": pytest.approx(lengths.mean()),
        "median": np.quantile(lengths, 0.5, method="inverted_cdf"),
        "p95": np.quantile(lengths, 0.95, method="inverted_cdf"),
        "max": lengths.max(),
    }
    assert found["prompt_tokens"]["mean"] == pytest.approx(np.mean([len(row.prompt_ids) for row in rows]))
    assert found["finish_reasons"] == {"stop": 30, "length": 10} and found["truncated_share"] == 0.25


def test_lengths_grow_and_shrink_between_row_groups() -> None:
    lengths = Lengths()
    for part in ([3, 3], [900], [1]):
        lengths.add(np.array(part))
    assert lengths.summary() == {"mean": 226.75, "median": 3, "p95": 900, "max": 900}


def test_topk_coverage() -> None:
    rows = made_rows(topk=3)
    held, mass = [], []
    for row in rows:
        assert row.topk_ids is not None and row.topk_logprobs is not None
        held += [token in top for token, top in zip(row.completion_ids, row.topk_ids, strict=True)]
        mass += [np.exp(top.astype(np.float64)).sum() for top in row.topk_logprobs]
    found = gathered(rows, at_once=5, topk=3).summary()
    assert 0 < found["topk_holds_token"]["mean"] == pytest.approx(np.mean(held))
    assert found["topk_mass"]["mean"] == pytest.approx(np.mean(mass))


def test_histograms_hold_every_token() -> None:
    rows = made_rows()
    deep = make_row(99, tokens=2, rollout_logprobs=np.array([-0.05, -1e9], np.float32))
    statistics = gathered([*rows, deep], at_once=5)
    tokens = sum(len(row.completion_ids) for row in rows) + 2
    assert statistics.rollout_histogram.sum() == statistics.teacher_histogram.sum() == tokens
    assert (statistics.density.sum(1) == statistics.rollout_histogram).all()
    assert (statistics.density.sum(0) == statistics.teacher_histogram).all()
    assert statistics.rollout_histogram[0] == 1
    sampled = np.concatenate([row.rollout_logprobs for row in rows])
    edges = np.arange(-round(FLOOR / BIN), 1) * BIN
    assert (statistics.rollout_histogram - gathered([deep], at_once=1).rollout_histogram).tolist() == np.histogram(
        sampled, edges
    )[0].tolist()


def test_what_is_not_scored_has_no_gap() -> None:
    found = gathered(made_rows(scored=False), at_once=5, scored=False).summary()
    assert "gap" not in found and "teacher_logprob" not in found and found["rollout_logprob"]["mean"] < 0


@settings(max_examples=60, deadline=None)
@given(row_lists())
def test_any_rows_give_finite_figures(drawn: tuple[list[Rollout], int, bool]) -> None:
    rows, topk, scored = drawn
    found = gathered(rows, at_once=2, topk=topk, scored=scored).summary()
    sampled = np.concatenate([row.rollout_logprobs for row in rows]).astype(np.float64)
    assert found["rollout_logprob"]["mean"] == pytest.approx(sampled.mean())
    if scored:
        assert found["gap"]["mean"] == pytest.approx(np.concatenate([gaps(row) for row in rows]).mean(), abs=1e-9)
