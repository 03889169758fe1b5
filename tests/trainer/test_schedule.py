import pytest

from trainer.schedule import lr


def rates(schedule, warmup, total):
    return [lr(step, peak=1.0, schedule=schedule, warmup=warmup, total=total) for step in range(total)]


def test_constant_holds_after_a_linear_rise():
    assert rates("constant", 4, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_the_peak_to_nearly_zero():
    values = rates("cosine", 2, 12)
    assert values[1:3] == [1.0, 1.0]
    assert values[7] == pytest.approx(0.5)
    assert values == sorted(values[:2]) + sorted(values[2:], reverse=True)
    assert 0 < values[-1] < 0.03


def test_warmup_may_take_the_whole_run():
    assert rates("cosine", 3, 3)[-1] == 1.0
