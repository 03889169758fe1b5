"""What counts as the same log-probs."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pytest

from precompute.audit.agreement import LIMITS, Agreement, Rescored, Row, compare, faults

FLOAT32, BFLOAT16 = LIMITS["float32"], LIMITS["bfloat16"]
TOKENS, K = 40, 3


def make_rows(count: int = 4, noise: float = 1e-5, topk: bool = False) -> list[Row]:
    """Rows whose stored log-probs are the recomputed ones with a little noise."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(count):
        logprobs = -generator.exponential(2.0, TOKENS).astype(np.float32)
        stored = logprobs + noise * generator.normal(size=TOKENS).astype(np.float32)
        at_ids = -np.sort(generator.exponential(2.0, (TOKENS, K)), axis=1).astype(np.float32)
        ids = np.tile(np.arange(K, dtype=np.int32), (TOKENS, 1))
        rows.append(
            Row(
                uid=f"p{index}/0",
                completion_ids=np.arange(TOKENS, dtype=np.int32),
                stored=stored,
                again=Rescored(
                    logprobs, np.zeros(TOKENS, np.float32), np.zeros(TOKENS, bool), at_ids, at_ids.min(axis=1)
                ),
                topk_ids=ids if topk else None,
                topk_logprobs=at_ids.copy() if topk else None,
            )
        )
    return rows


def changed(rows: list[Row], change: Callable[[np.ndarray], np.ndarray]) -> list[Row]:
    return [replace(row, stored=change(row.stored)) for row in rows]


def again(rows: list[Row], **columns: np.ndarray) -> list[Row]:
    return [replace(row, again=row.again._replace(**columns)) for row in rows]


def told(rows: list[Row], limits: object = FLOAT32) -> list[str]:
    return faults(compare(rows, limits), limits)  # type: ignore[arg-type]


def test_noise_of_the_arithmetic_is_no_fault() -> None:
    found = compare(make_rows(), FLOAT32)
    assert faults(found, FLOAT32) == []
    assert 0 < found.here.mean < found.p99 <= found.largest < 1e-4
    assert found.here.correlation is not None and found.here.correlation > 0.999999
    assert (found.rows, found.tokens, found.blurred, found.outside) == (4, 4 * TOKENS, 0, 0)


@pytest.mark.parametrize(("by", "side"), [(1, "later"), (-1, "earlier")])
def test_a_shift_by_one_token_is_named_with_its_side_although_the_mean_fits(by: int, side: str) -> None:
    rows = changed(make_rows(), lambda stored: np.roll(stored, by))
    found = compare(rows, BFLOAT16)
    assert abs(found.signed) < BFLOAT16.mean
    assert faults(found, BFLOAT16)[0] == f"the stored log-probs fit better one token {side}"


def test_a_shift_of_one_row_among_many_breaks_the_limits() -> None:
    rows = make_rows(20)
    rows[7] = changed([rows[7]], lambda stored: np.roll(stored, 1))[0]
    found = compare(rows, FLOAT32)
    assert found.by_row[0].uid == found.uid == "p7/0"
    assert [fault.split()[0] for fault in faults(found, FLOAT32)] == ["mean", "largest"]


def test_a_column_that_fits_nowhere_is_a_fault() -> None:
    generator = np.random.default_rng(1)
    rows = changed(make_rows(), lambda stored: -generator.exponential(2.0, TOKENS).astype(np.float32))
    assert "one token" in told(rows)[0] and "mean" in told(rows)[1]


def test_log_probs_of_no_variety_pass_without_a_shift_test() -> None:
    rows = again(changed(make_rows(), lambda stored: 0 * stored), logprobs=np.full(TOKENS, -1e-6, np.float32))
    found = compare(rows, FLOAT32)
    assert found.here.correlation is None
    assert faults(found, FLOAT32) == []


def test_the_largest_difference_is_found_with_its_place() -> None:
    rows = make_rows()
    rows[2].stored[17] += 0.5
    found = compare(rows, FLOAT32)
    assert (found.uid, found.position, found.token) == ("p2/0", 17, 17)
    assert found.largest == pytest.approx(0.5, abs=1e-3)
    assert found.by_row[0].uid == "p2/0"
    assert [row.mean for row in found.by_row] == sorted((row.mean for row in found.by_row), reverse=True)


def test_a_constant_offset_breaks_the_mean_alone() -> None:
    rows = changed(make_rows(), lambda stored: stored - 1e-3)
    assert told(rows) == ["mean |d| 0.001 is over 0.0005"]


def test_bfloat16_may_differ_more_than_float32() -> None:
    rows = make_rows(noise=0.04)
    assert told(rows, BFLOAT16) == []
    assert len(told(rows, FLOAT32)) == 2


def test_tokens_at_an_unsure_edge_are_left_out_and_counted() -> None:
    blur = np.zeros(TOKENS, np.float32)
    blur[[3, 5]] = 1.0
    rows = again(make_rows(), blur=blur)
    for row in rows:
        row.stored[[3, 5]] -= 0.7
    found = compare(rows, FLOAT32)
    assert (found.tokens, found.blurred) == (4 * (TOKENS - 2), 8)
    assert faults(found, FLOAT32) == []


@pytest.mark.parametrize(("unsure", "compared"), [(TOKENS - 1, 4), (TOKENS // 2 + 1, 4 * 19), (TOKENS, 0)])
def test_a_sample_of_mostly_unsure_tokens_fails(unsure: int, compared: int) -> None:
    blur = np.zeros(TOKENS, np.float32)
    blur[:unsure] = np.inf
    rows = again(make_rows(), blur=blur)
    for row in rows:
        row.stored[:unsure] -= 5
    said = f"only {compared} of {4 * TOKENS} tokens could be compared: the rest lie at an unsure edge"
    assert told(rows) == [said]


def test_half_of_the_tokens_are_enough_to_compare() -> None:
    blur = np.zeros(TOKENS, np.float32)
    blur[: TOKENS // 2] = 1
    assert told(again(make_rows(), blur=blur)) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", ["logprobs", "at_ids", "kth"])
def test_numbers_that_came_back_broken_are_a_fault_and_enter_no_figure(column: str, value: float) -> None:
    rows = make_rows(topk=True)
    getattr(rows[1].again, column)[[3, 5]] = value
    found = compare(rows, FLOAT32)
    assert faults(found, FLOAT32) == ["2 tokens came back NaN or infinite from the model"]
    assert (found.tokens, found.blurred, found.broken, found.scored) == (4 * TOKENS - 2, 0, 2, 4 * TOKENS)
    json.dumps(asdict(found), allow_nan=False)


def test_broken_numbers_are_no_unsure_ones() -> None:
    nothing = np.full(TOKENS, np.nan, np.float32)
    found = compare(again(make_rows(), logprobs=nothing, blur=nothing), FLOAT32)
    assert (found.tokens, found.blurred, found.broken) == (0, 0, 4 * TOKENS)


def test_a_model_that_gives_no_number_at_all_fails() -> None:
    rows = make_rows(topk=True)
    for row in rows:
        for column in (row.again.logprobs, row.again.blur, row.again.at_ids, row.again.kth):
            column[:] = np.nan
    found = compare(rows, FLOAT32)
    assert faults(found, FLOAT32) == ["160 tokens came back NaN or infinite from the model"]
    json.dumps(asdict(found), allow_nan=False)


def test_what_is_wrong_is_found_beside_broken_numbers() -> None:
    rows = make_rows(topk=True)
    rows[0].again.logprobs[3] = np.nan
    rows[2].stored[17] += 0.5
    assert [fault.split()[0] for fault in told(rows)] == ["1", "mean", "largest"]


def test_tokens_that_could_not_be_sampled_are_a_fault() -> None:
    outside = np.zeros(TOKENS, bool)
    outside[0] = True
    assert told(again(make_rows(), outside=outside)) == [
        "4 tokens could not be sampled: top-p, top-k or min-p cuts them off"
    ]


def topk_of(rows: list[Row]) -> Agreement:
    return compare(rows, FLOAT32)


def test_an_honest_topk_is_measured() -> None:
    found = topk_of(make_rows(topk=True)).topk
    assert found is not None
    assert (found.k, found.mean, found.largest, found.shortfall, found.repeated) == (K, 0, 0, 0, 0)
    assert topk_of(make_rows()).topk is None


def test_the_most_likely_ids_of_another_model_may_be_unlikely_but_their_log_probs_count() -> None:
    rows = [replace(row, ranked=False) for row in make_rows(topk=True)]
    rows = again(rows, kth=rows[0].again.at_ids.max(axis=1) + 0.5)
    found = topk_of(rows).topk
    assert found is not None and (found.shortfall, found.largest) == (None, 0)
    assert told(rows) == []
    wrong = [replace(row, topk_logprobs=row.again.at_ids - 0.01) for row in rows]
    assert [fault.split(" of ")[-1] for fault in told(wrong)] == [
        "the top-k log-probs is over 0.001",
        "the top-k log-probs is over 0.002",
    ]


def test_ids_stored_without_log_probs_are_held_to_be_the_most_likely() -> None:
    rows = [replace(row, topk_logprobs=None) for row in make_rows(topk=True)]
    found = topk_of(rows).topk
    assert found is not None and (found.mean, found.largest, found.shortfall) == (None, None, 0)
    assert "not the 3 most likely" in told(again(rows, kth=rows[0].again.at_ids.max(axis=1) + 0.5))[0]


def test_topk_ids_in_the_wrong_order_of_a_tie_are_no_fault() -> None:
    rows = make_rows(topk=True)
    rows = again(rows, kth=rows[0].again.at_ids.min(axis=1) + 1e-3)[:1]
    assert told(rows) == []


def test_ids_that_are_not_the_most_likely_are_a_fault() -> None:
    rows = make_rows(topk=True)
    assert "not the 3 most likely" in told(again(rows, kth=rows[0].again.at_ids.max(axis=1) + 0.5))[0]


def test_an_id_named_twice_is_a_fault() -> None:
    rows = make_rows(topk=True)
    assert rows[1].topk_ids is not None
    rows[1].topk_ids[4] = [2, 0, 2]
    assert told(rows) == ["top-k names an id twice at 1 positions"]


def test_other_topk_logprobs_are_a_fault() -> None:
    rows = make_rows(topk=True)
    rows = [replace(row, topk_logprobs=row.again.at_ids - 0.01) for row in rows]
    assert [fault.split(" of ")[-1] for fault in told(rows)] == [
        "the top-k log-probs is over 0.001",
        "the top-k log-probs is over 0.002",
    ]
