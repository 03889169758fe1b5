import pytest

from precompute.fleet.rate import Rate, cost_of, eta_s


def test_the_rate_is_that_of_the_last_minute() -> None:
    rate = Rate(0.0, window_s=60.0)
    rate.add(10.0, 6000)
    rate.add(100.0, 300)
    rate.add(110.0, 300)
    assert rate.per_s(110.0) == 10.0


def test_before_a_minute_has_passed_it_is_that_of_the_time_so_far() -> None:
    rate = Rate(1000.0, window_s=60.0)
    rate.add(1005.0, 100)
    assert rate.per_s(1010.0) == 10.0


def test_what_came_in_no_time_tells_no_rate() -> None:
    rate = Rate(5.0)
    rate.add(5.0, 1_000_000)
    assert rate.per_s(5.5) is None
    assert rate.per_s(6.0) == 1_000_000


def test_the_rate_falls_to_nothing_when_nothing_comes() -> None:
    rate = Rate(0.0, window_s=60.0)
    for second in range(60):
        rate.add(float(second), 0.1)
    assert rate.per_s(89.5) == pytest.approx(0.05)
    assert rate.per_s(200.0) == 0.0


def test_an_event_counts_for_the_whole_window_and_no_longer() -> None:
    rate = Rate(0.0, window_s=60.0)
    rate.add(0.0, 60)
    assert rate.per_s(59.999) == pytest.approx(1.0, rel=1e-3)
    assert rate.per_s(60.0) == 0.0


@pytest.mark.parametrize(
    ("left", "per_s", "seconds"),
    [(100, 4.0, 25.0), (100, None, None), (100, 0.0, None), (0, None, 0.0), (-1, 2.0, 0.0)],
)
def test_the_time_left_is_unknown_until_something_moves(left: int, per_s: float | None, seconds: float | None) -> None:
    assert eta_s(left, per_s) == seconds


def test_cost_is_by_the_hour_and_unknown_without_a_price() -> None:
    assert cost_of(1800.0, 4.0) == 2.0
    assert cost_of(1800.0, 0.0) == 0.0
    assert cost_of(1800.0, None) is None
