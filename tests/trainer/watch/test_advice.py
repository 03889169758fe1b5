import pytest

from trainer.config import OpdConfig, SftConfig
from trainer.watch.advice import WINDOW, advice, limits_of, runaway, signs

FRESH = {"ratio/ess": 0.98, "kl/rollout_k3": 1e-3, "ratio/clipped": 0.0}
"""What two bfloat16 engines say of the very same weights."""


def opd(**settings: float) -> OpdConfig:
    return OpdConfig.model_validate({"model": "m", "data": "d", "output": "o", **settings})


def test_noise_between_two_engines_is_no_sign():
    assert signs([FRESH] * 50, limits_of(opd())) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ratio/ess": 0.4}, "ratio/ess 0.4 is below spent_ess=0.5"),
        ({"kl/rollout_k3": 0.3}, "kl/rollout_k3 0.3 is over spent_k3=0.1"),
        ({"ratio/clipped": 0.25}, "ratio/clipped 0.25 is over spent_clipped=0.2"),
    ],
)
def test_each_sign_is_named_with_its_limit(change, said):
    assert signs([{**FRESH, **change}] * WINDOW, limits_of(opd())) == [said]


def test_one_freak_batch_says_nothing_and_a_lasting_change_does():
    freak = {**FRESH, "ratio/ess": 0.1}
    assert signs([FRESH] * 10 + [freak] + [FRESH] * 2, limits_of(opd())) == []
    assert signs([FRESH] * 10 + [freak] * 3, limits_of(opd())) != []


def test_too_few_steps_say_nothing():
    assert signs([{**FRESH, "ratio/ess": 0.1}] * (WINDOW - 1), limits_of(opd())) == []


def test_a_missing_figure_is_no_sign():
    assert signs([{**FRESH, "ratio/ess": None}] * WINDOW, limits_of(opd())) == []


def test_the_limits_are_settings():
    records = [{**FRESH, "ratio/ess": 0.4}] * WINDOW
    assert signs(records, limits_of(opd(spent_ess=0.3))) == []
    assert signs([FRESH] * WINDOW, limits_of(opd(spent_k3=1e-4))) != []


def test_sft_has_no_rollouts_that_could_be_spent():
    assert limits_of(SftConfig(model="m", data="d", output="o")) == ()


def test_the_advice_names_the_next_round_and_its_command():
    said = advice(["ratio/ess 0.4 is below spent_ess=0.5"], output="s3://b/run", round_=2)
    assert "ratio/ess 0.4" in said and "round 3" in said and "make precompute MODEL=s3://b/run/export" in said


def test_a_student_that_has_run_away_is_told_of_at_once_and_not_to_be_sampled():
    assert runaway({"step": 3, "kl/rollout_k1": 0.2}) is None
    assert runaway({"step": 3}) is None
    said = runaway({"step": 3, "kl/rollout_k1": 253.5})
    assert said is not None and "step 3" in said and "lower lr" in said and "do not sample" in said
