"""Means over seeds: their intervals are Student's, and what two arms share cancels in their difference."""

import math

import pytest

from benchmarks.study.results.statistics import T95, Mean, difference


@pytest.mark.parametrize("freedom", sorted(T95))
def test_95_percent_of_the_t_distribution_lies_within_its_quantile(freedom: int) -> None:
    norm = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))

    def density(x: float) -> float:
        return norm * (1 + x * x / freedom) ** (-(freedom + 1) / 2)

    pieces = 4000
    width = T95[freedom] / pieces
    inside = sum((density(i * width) + density((i + 1) * width)) / 2 * width for i in range(pieces))
    assert 2 * inside == pytest.approx(0.95, abs=5e-5)  # the quantiles have three decimals


@pytest.mark.parametrize(
    ("values", "mean", "low", "high"),  # mean -+ t(0.975, n - 1) x standard error
    [
        ([1, 2, 3, 4, 5], 3.0, 1.036757, 4.963243),
        ([0.60, 0.62, 0.67], 0.63, 0.540433, 0.719567),
        ([0.0, 1.0], 0.5, -5.853102, 6.853102),
    ],
)
def test_the_interval_is_that_of_student(values: list[float], mean: float, low: float, high: float) -> None:
    found = Mean.of(values)
    assert (found.mean, found.low, found.high) == pytest.approx((mean, low, high), abs=1e-3)
    assert found.values == tuple(values)


def test_only_an_interval_on_one_side_of_zero_has_a_sign() -> None:
    assert Mean.of([0.9, 1.0, 1.1]).sign == 1
    assert Mean.of([-0.9, -1.0, -1.1]).sign == -1
    assert Mean.of([-1.0, 0.1, 1.0]).sign == 0


def test_a_difference_is_taken_seed_by_seed() -> None:
    """Each arm alone varies by more than they differ; the difference does not vary."""
    one, other = [0.5, 0.7, 0.9], [0.4, 0.6, 0.8]
    assert difference(other, one).sign == -1 and Mean.of(one).low < Mean.of(other).high
    found = difference(one, other)
    assert found.mean == pytest.approx(0.1)
    assert found.half == pytest.approx(0, abs=1e-12)
    assert found.sign == 1


def test_arms_of_unequal_seeds_have_no_paired_difference() -> None:
    with pytest.raises(ValueError, match="shorter"):
        difference([0.5, 0.6, 0.7], [0.5, 0.6])


def test_two_values_agree_by_the_spread_of_the_recorded_ones_and_not_by_their_own() -> None:
    recorded = Mean.of([0.80, 0.81, 0.82, 0.79, 0.78])
    assert Mean.of([0.80, 0.82]).agrees(recorded)
    wide = Mean.of([0.2, 0.9])
    assert wide.low < recorded.mean < wide.high
    assert not wide.agrees(recorded)
    assert not Mean.of([0.70, 0.71]).agrees(recorded)
    assert Mean.of([0.70, 0.71]).agrees(recorded, allowed=0.06)
