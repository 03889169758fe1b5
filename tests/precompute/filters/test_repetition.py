"""The two measures of repetition, against their definitions spelled out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from precompute.filters.repetition import LOOP_TIMES, LOOP_TOKENS, loop_at_end, repeated_share

IDS = st.lists(st.integers(0, 3), max_size=60)


def ids_of(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


@given(IDS, st.integers(1, 6))
def test_the_repeated_share_is_the_share_of_ngrams_that_stood_before(values: list[int], n: int) -> None:
    grams = [tuple(values[start : start + n]) for start in range(len(values) - n + 1)]
    repeated = sum(gram in grams[:place] for place, gram in enumerate(grams))
    assert repeated_share(ids_of(values), n) == pytest.approx(repeated / len(grams) if grams else 0)


@given(st.lists(st.integers(0, 2**31 - 1), unique=True, max_size=60), st.integers(1, 6))
def test_tokens_that_never_return_repeat_nothing(values: list[int], n: int) -> None:
    assert repeated_share(ids_of(values), n) == 0
    assert loop_at_end(ids_of(values)) == 0


def loop_by_definition(values: list[int]) -> bool:
    """Try every period, token by token."""
    for period in range(1, len(values) // LOOP_TIMES + 1):
        lasts = period
        while lasts < len(values) and values[-1 - lasts] == values[-1 - lasts + period]:
            lasts += 1
        if lasts >= max(LOOP_TOKENS, LOOP_TIMES * period):
            return True
    return False


PATTERNS = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@given(IDS, PATTERNS, st.integers(1, 90), st.integers(0, 29))
def test_a_loop_is_found_where_it_is_and_nowhere_else(
    before: list[int], pattern: list[int], times: int, part: int
) -> None:
    values = before + pattern * times + pattern[: part % len(pattern)]
    found = loop_at_end(ids_of(values))
    assert bool(found) == loop_by_definition(values)
    if times * len(pattern) >= LOOP_TOKENS and times >= LOOP_TIMES:
        assert len(values) >= found >= times * len(pattern)


def test_a_loop_of_a_paragraph_is_found_with_its_length() -> None:
    generator = np.random.default_rng(0)
    before, paragraph = generator.integers(0, 100_000, 500), generator.integers(0, 100_000, 300)
    stuck = np.concatenate([before, np.tile(paragraph, 4), paragraph[:17]])
    assert loop_at_end(stuck) == 4 * 300 + 17
    assert loop_at_end(stuck[: -300 - 17]) == 0  # three times are no loop


def test_a_loop_that_was_left_is_none() -> None:
    assert loop_at_end(np.concatenate([np.zeros(500, np.int32), [7]])) == 0
    assert loop_at_end(np.zeros(LOOP_TOKENS - 1, np.int32)) == 0
    assert loop_at_end(np.zeros(0, np.int32)) == 0
