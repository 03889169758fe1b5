"""The arithmetic of `lopd precompute plan`, on numbers that can be done by hand."""

import math

import pytest

from precompute.forecast.estimate import (
    NORMAL_95,
    Box,
    Measured,
    Range,
    Size,
    advise,
    estimate,
    mean_length,
    steady_rate,
)

SIZE = Size(prompts=1000, samples=2, max_tokens=400, prompts_per_shard=64)
SEEN = Measured(
    completions={"a": [100, 100], "b": [200, 200]},
    work=600, seconds=60.0, steady=20.0, startup_s=360.0, stored=4800, truncated=1,
)  # fmt: skip


def test_the_mean_length_lies_within_students_t_of_the_prompts_means() -> None:
    lengths = {"a": [90, 110], "b": [200], "c": [300, 300, 300]}  # means 100, 200, 300: s = 100
    told = mean_length(lengths, 4096)
    assert told.low == pytest.approx(200 - 2.920 * 100 / math.sqrt(3))
    assert told.high == pytest.approx(200 + 2.920 * 100 / math.sqrt(3))


def test_the_mean_length_stays_within_what_is_possible() -> None:
    assert mean_length({"a": [100], "b": [200]}, 400) == Range(low=1, high=400)  # 150 +- 316
    assert mean_length({"a": [100, 120, 140]}, 400) == Range(low=1, high=400)  # one prompt tells nothing of others
    assert mean_length({"a": [5], "b": [5]}, 400) == Range(low=5, high=5)


def test_many_prompts_are_judged_by_the_normal_distribution() -> None:
    told = mean_length({str(index): [100 + index % 2] for index in range(100)}, 4096)
    assert told.high - told.low == pytest.approx(2 * NORMAL_95 * math.sqrt(25 / 99) / 10)


def test_a_pilot_is_carried_over_to_the_whole_job() -> None:
    told = estimate("rollouts", SIZE, Box(replicas=4, gpus=8, price_per_hour=10.0), SEEN)
    assert (told.rows, told.shards) == (2000, 16)
    assert told.tokens == Range(low=2000, high=800_000)
    assert told.stored == Range(low=16_000, high=6_400_000)  # 8 bytes a token
    assert told.rate == Range(low=40, high=80)  # 10 and 20 a second on each of four
    assert told.hours is not None and told.cost is not None and told.gpu_hours is not None
    assert told.hours.low == pytest.approx(0.1 + 2000 / 80 / 3600)
    assert told.hours.high == pytest.approx(0.1 + 800_000 / 40 / 3600)
    assert told.gpu_hours.high == pytest.approx(8 * told.hours.high)
    assert told.cost.low == pytest.approx(10 * told.hours.low)


def test_scoring_is_paid_by_prompt_and_completion_and_told_by_completion() -> None:
    scored = Measured(SEEN.completions, work=1200, seconds=60, steady=20, startup_s=0, stored=1, truncated=0)
    told = estimate("score", SIZE, Box(1, 1), scored)
    assert told.rate == Range(low=10, high=10)
    assert told.hours is not None and told.hours.high == pytest.approx(800_000 / 10 / 3600)
    assert told.cost is None


def test_on_a_cpu_there_are_no_gpu_hours() -> None:
    assert estimate("rollouts", SIZE, Box(1, 0), SEEN).gpu_hours is None


def test_without_a_pilot_the_longest_completions_bound_the_job() -> None:
    told = estimate("rollouts", Size(1000, 2, 400, 64, topk=10), Box(1, 1, 3.0), None)
    assert told.tokens == Range(low=2000, high=800_000)
    assert told.stored.high == 800_000 * (8.5 + 80)
    assert told.hours is None and told.cost is None and told.rate is None


@pytest.mark.parametrize(
    ("seconds", "size", "prompts", "replicas", "count", "why"),
    [
        (1.0, 1e3, 100_000, 8, 450, "5 to 10 minutes"),
        (1.0, 1e6, 100_000, 8, 128, "too large"),
        (1.0, 1e3, 1000, 8, 31, "the job is short"),
        (2000.0, 1e3, 100_000, 8, 1, "5 to 10 minutes"),
        (1.0, 1e3, 2, 8, 1, "the job is short"),
    ],
)
def test_a_shard_is_as_long_as_a_death_may_cost(
    seconds: float, size: float, prompts: int, replicas: int, count: int, why: str
) -> None:
    advice = advise(seconds, size, prompts, replicas)
    assert advice.prompts_per_shard == count and why in advice.reason
    assert advice.seconds == count * seconds and advice.stored == count * size


def test_the_first_half_of_a_pilot_counts_what_is_still_growing() -> None:
    """Four rows grow by one token a second; by second 20, when half have left, each has 20 or its whole length."""
    lengths, left = [10, 20, 30, 40], [10.0, 20.0, 30.0, 40.0]
    assert steady_rate(lengths, left, [True] * 4, partial=True) == pytest.approx((10 + 20 + 20 + 20) / 20)
    assert steady_rate(lengths, left, [True, True, True, False], partial=True) == pytest.approx((10 + 20 + 20) / 20)
    assert steady_rate(lengths, left, [True] * 4, partial=False) == pytest.approx((10 + 20) / 20)
    assert steady_rate(lengths[::-1], left[::-1], [True] * 4, partial=True) == pytest.approx(70 / 20)
