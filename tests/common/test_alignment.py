import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.alignment import MIN_TOKENS, check_alignment, measure_shifts
from common.errors import DataError

Columns = tuple[list[np.ndarray], list[np.ndarray]]


def columns(seed: int, rows: int, longest: int, noise: float) -> Columns:
    """Log-probs of two models that find the same tokens hard; difficulty has no memory from token to token."""
    random = np.random.default_rng(seed)
    rollout, teacher = [], []
    for _ in range(rows):
        hardness = random.exponential(1.0, random.integers(1, longest + 1))
        rollout.append((-hardness).astype(np.float32))
        teacher.append((-np.abs(hardness + noise * random.normal(size=len(hardness)))).astype(np.float32))
    return rollout, teacher


@st.composite
def correlated(draw: st.DrawFn) -> Columns:
    made = columns(
        draw(st.integers(0, 2**32)), draw(st.integers(20, 60)), draw(st.integers(20, 60)), draw(st.floats(0, 0.7))
    )
    assume(sum(map(len, made[0])) >= 400)
    return made


@given(correlated())
@settings(max_examples=40, deadline=None)
def test_columns_of_the_same_tokens_are_accepted(made: Columns) -> None:
    alignment = check_alignment(*made, where="test")

    assert alignment.judged
    assert alignment.here > max(alignment.before, alignment.after)
    assert alignment.tokens == sum(len(row) for row in made[0])


@given(correlated(), st.sampled_from([-1, 1]))
@settings(max_examples=40, deadline=None)
def test_a_shift_by_one_token_is_refused(made: Columns, offset: int) -> None:
    rollout, teacher = made
    with pytest.raises(DataError, match="not aligned .*shard 3"):
        check_alignment(rollout, [np.roll(row, offset) for row in teacher], where="shard 3")


def test_columns_of_other_rows_are_refused_or_at_least_do_not_correlate() -> None:
    rollout, teacher = columns(0, rows=30, longest=50, noise=0.1)
    other = [row[: len(rollout[index])] for index, row in enumerate(columns(1, 30, 50, 0.1)[1])]
    pairs = [(one[: len(two)], two) for one, two in zip(rollout, other, strict=True)]
    try:
        alignment = check_alignment([one for one, _ in pairs], [two for _, two in pairs], where="x")
    except DataError:
        return
    assert abs(alignment.here) < 0.2 < check_alignment(rollout, teacher, where="x").here


def test_the_same_model_correlates_perfectly() -> None:
    rollout, _ = columns(0, rows=10, longest=60, noise=0)
    assert check_alignment(rollout, rollout, where="x").here == pytest.approx(1)


def test_too_few_tokens_are_not_judged() -> None:
    row = np.linspace(-1, 0, MIN_TOKENS - 1, dtype=np.float32)
    assert not check_alignment([row], [np.roll(row, 1)], where="x").judged
    assert not check_alignment([], [], where="x").judged


def test_a_column_without_variety_is_not_judged() -> None:
    row = np.zeros(2 * MIN_TOKENS, np.float32)
    assert not check_alignment([row], [row], where="x").judged


def test_rows_of_one_token_have_no_neighbours_and_are_not_judged() -> None:
    rows = [np.array([-float(index)], np.float32) for index in range(2 * MIN_TOKENS)]
    assert not check_alignment(rows, rows, where="x").judged


@given(correlated(), st.lists(st.integers(0, 60), max_size=5))
@settings(max_examples=40, deadline=None)
def test_rows_in_parts_are_judged_as_the_whole(made: Columns, cuts: list[int]) -> None:
    rollout, teacher = made
    bounds = [0, *sorted(cuts), len(rollout)]
    parts = [
        measure_shifts(rollout[start:stop], teacher[start:stop])
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]
    together = parts[0]
    for part in parts[1:]:
        together = together + part

    whole = check_alignment(rollout, teacher, where="x")
    assert together.alignment.tokens == whole.tokens
    for offset in ("before", "here", "after"):
        assert getattr(together.alignment, offset) == pytest.approx(getattr(whole, offset), abs=1e-9)


def test_the_correlation_is_pearson_s() -> None:
    rollout, teacher = columns(3, rows=30, longest=50, noise=0.4)
    ours, theirs = np.concatenate(rollout), np.concatenate(teacher)
    here = check_alignment(rollout, teacher, where="x").here
    assert here == pytest.approx(np.corrcoef(ours, theirs)[0, 1], abs=1e-6)
