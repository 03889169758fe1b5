"""No question is asked in two places, and the recipe fits the networks."""

import tomllib
from pathlib import Path

import pytest

from benchmarks.study.arms import PAPER, ROUNDS, ROUNDS_ROLLOUTS, ROUNDS_ROWS, SHORT, Extent
from benchmarks.study.distil import LIKE_OPD
from benchmarks.study.lab import RECIPE, Lab
from benchmarks.study.questions import ANSWERED, ANSWERED_AFRESH, BETWEEN, HELD_OUT, LIVE, MOST_SEEDS, ROLLED_OUT
from benchmarks.study.setting.networks import MAX_TOKENS
from tests.trainer import build
from trainer.world import joined


def test_ranges_of_questions_do_not_meet() -> None:
    extent = Extent()
    of_seeds = MOST_SEEDS * BETWEEN
    starts = [HELD_OUT, ANSWERED, ANSWERED_AFRESH, ROLLED_OUT, LIVE]
    lengths = [of_seeds, 2 * extent.answers, 2 * extent.rollouts, of_seeds]
    for start, length, following in zip(starts, lengths, starts[1:], strict=False):
        assert start + length <= following
    assert 2 * extent.rows_per_step * extent.stops[-1] <= BETWEEN
    assert 2 * max(extent.rollouts, ROUNDS_ROLLOUTS) <= BETWEEN


@pytest.mark.parametrize("count", ROUNDS)
def test_rounds_share_rows_and_steps_out_without_a_rest(count: int) -> None:
    rows, steps = ROUNDS_ROLLOUTS // count, SHORT // count
    assert rows * count == ROUNDS_ROLLOUTS and steps * count == SHORT
    assert rows % ROUNDS_ROWS == 0
    assert steps * ROUNDS_ROWS == 2 * rows


def test_answers_are_as_long_offline_as_live() -> None:
    recipe = tomllib.loads(RECIPE.read_text())
    assert {recipe[section]["sampling"]["max_tokens"] for section in ("sft_data", "rollouts")} == {MAX_TOKENS}


def test_settings_of_an_arm_hold_every_default_but_no_place(tmp_path: Path) -> None:
    with joined("cpu") as world:
        lab = Lab(tmp_path, Extent(), world, lambda line: None)
    settings = lab.settings("opd", 3, PAPER.settings)
    assert settings["loss_mean"] == "rollout" and settings["lr"] == Extent().lr and settings["seed"] == 3
    assert "max_importance_ratio" in settings and "output" not in settings


def test_a_stop_keeps_its_identity_when_training_has_gone_on(tmp_path: Path) -> None:
    """A second run of the study finds the last weights in the place of all; they must not pass for others."""
    teacher = build.make_model(tmp_path / "teacher")
    student = build.make_student(tmp_path / "student", teacher)
    rows = build.sample(build.open_model(teacher), prompts=4)
    answers = Path(build.make_dataset(tmp_path / "answers", rows, kind="sft", policy=teacher))

    def identities() -> list[str]:
        with joined("cpu") as world:
            lab = Lab(tmp_path / "study", Extent(), world, lambda line: None)
            return [lab.fine_tuned("sft", student, answers, steps, 0, **LIKE_OPD)[1] for steps in (1, 2)]

    first, second = identities()
    assert first != second
    assert identities() == [first, second]
