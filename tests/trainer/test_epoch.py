import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.epoch import plan, shuffled, steps_per_epoch, turns

settings = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 5),
        "epoch": st.integers(0, 5),
        "token_budget": st.integers(50, 200),
        "rows_per_step": st.integers(1, 40),
        "shuffle_shards": st.integers(1, 4),
    }
)
row_lengths = st.lists(st.integers(1, 50), min_size=1, max_size=120).map(np.array)


def shards_of(lengths: np.ndarray) -> np.ndarray:
    return np.arange(len(lengths)) // 10


@given(lengths=row_lengths, settings=settings)
def test_every_row_comes_exactly_once_and_no_bin_overflows(lengths, settings):
    steps = plan(lengths, shards_of(lengths), **settings)
    bins = [bin for step in steps for bin in step]
    assert sorted(row for bin in bins for row in bin) == list(range(len(lengths)))
    assert all(lengths[list(bin)].sum() <= settings["token_budget"] for bin in bins)
    assert len(steps) == steps_per_epoch(len(lengths), settings["rows_per_step"])
    assert all(sum(map(len, step)) == settings["rows_per_step"] for step in steps[:-1])


@given(lengths=row_lengths, settings=settings)
def test_two_neighbouring_bins_would_not_fit_into_one(lengths, settings):
    for step in plan(lengths, shards_of(lengths), **settings):
        sums = sorted(lengths[list(bin)].sum() for bin in step)
        assert len(sums) < 2 or sums[0] + sums[1] > settings["token_budget"]


@given(lengths=row_lengths, settings=settings, world=st.integers(1, 5))
def test_ranks_share_the_bins_of_a_step_and_take_equal_turns(lengths, settings, world):
    for step in plan(lengths, shards_of(lengths), **settings):
        shares = [turns(step, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(bin for share in shares for bin in share if bin) == sorted(step)


def test_the_plan_is_a_function_of_its_arguments():
    lengths = np.arange(1, 51)
    same = {"token_budget": 64, "rows_per_step": 8, "shuffle_shards": 2}
    first = plan(lengths, shards_of(lengths), seed=1, epoch=0, **same)
    assert first == plan(lengths, shards_of(lengths), seed=1, epoch=0, **same)
    assert first != plan(lengths, shards_of(lengths), seed=1, epoch=1, **same)
    assert first != plan(lengths, shards_of(lengths), seed=2, epoch=0, **same)


def test_the_order_never_changes_between_releases():
    order = shuffled(np.zeros(10, int), seed=3, epoch=1, shuffle_shards=1)
    assert order.tolist() == [5, 1, 0, 2, 6, 3, 9, 8, 7, 4]


def test_rows_mix_only_within_a_window_of_shards():
    shards = np.repeat(np.arange(6), 10)
    order = shuffled(shards, seed=0, epoch=0, shuffle_shards=2)
    windows = [set(shards[order[start : start + 20]]) for start in (0, 20, 40)]
    assert all(len(window) == 2 for window in windows)
    assert set().union(*windows) == set(range(6))


def test_a_row_longer_than_the_budget_is_refused():
    with pytest.raises(ValueError, match="row 1 has 70 tokens"):
        plan(np.array([3, 70]), np.zeros(2, int), seed=0, epoch=0, token_budget=64, rows_per_step=2, shuffle_shards=1)
