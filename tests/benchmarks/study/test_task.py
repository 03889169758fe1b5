"""The study's task: every chain answers its question, in its habit, and nothing that is measured is trained on."""

import random
from pathlib import Path
from typing import get_args

import pytest

from benchmarks.study.arms import Extent
from benchmarks.study.lab import Lab
from benchmarks.study.questions import HELD_OUT
from benchmarks.study.setting import task
from benchmarks.study.setting.networks import CONTEXT, decode, encode
from benchmarks.study.setting.task import ALPHABET, KEPT, LONGEST_ANSWER, Habit, chain, is_right, question
from trainer.world import joined

HABITS: tuple[Habit, ...] = get_args(Habit)
MANY = 400


def chains(habit: Habit) -> list[tuple[task.Question, str]]:
    draw = random.Random(7)
    return [(asked, chain(asked, habit, draw)) for asked in (question(draw) for _ in range(MANY))]


def labels(answer: str) -> str:
    return "".join(character for character in answer if character in task.LABELS)


@pytest.mark.parametrize("habit", HABITS)
def test_a_chain_without_slips_is_right_in_any_habit(habit: Habit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "SLIP", 0.0)
    assert all(is_right(answer, asked.answer) for asked, answer in chains(habit))


@pytest.mark.parametrize("habit", HABITS)
def test_slips_leave_most_chains_right_and_some_wrong(habit: Habit) -> None:
    """Six sums a chain on average, each right with a probability of 0.98."""
    right = sum(is_right(answer, asked.answer) for asked, answer in chains(habit)) / MANY
    assert 0.8 < right < 0.96


@pytest.mark.parametrize("habit", HABITS)
def test_a_chain_goes_through_every_label_once(habit: Habit) -> None:
    for asked, answer in chains(habit):
        assert sorted(labels(answer)) == sorted(label for label, _ in asked.numbers)


def test_the_habits_are_each_other_turned_round() -> None:
    """Where the first step is the habit's own: always but for what chance leaves it, 15% of the time."""
    up = sum(labels(answer)[0] == min(labels(answer)) for _, answer in chains("up")) / MANY
    down = sum(labels(answer)[0] == max(labels(answer)) for _, answer in chains("down")) / MANY
    assert up > KEPT - 0.05 and down > KEPT - 0.05
    assert sum(labels(answer)[0] == min(labels(answer)) for _, answer in chains("down")) / MANY < 0.15


@pytest.mark.parametrize("habit", HABITS)
def test_a_chain_fits_the_alphabet_and_the_network(habit: Habit) -> None:
    for asked, answer in chains(habit):
        assert set(asked.prompt + answer) <= set(ALPHABET)
        assert len(answer) <= LONGEST_ANSWER
        assert len(asked.prompt) + len(answer) <= CONTEXT
        assert decode(encode(answer)) == answer


def test_only_the_total_at_the_very_end_is_an_answer() -> None:
    asked, right = next((asked, answer) for asked, answer in chains("up") if is_right(answer, asked.answer))
    assert not is_right(right[:-1], asked.answer)
    assert not is_right(right + right[0], asked.answer)


def test_what_is_measured_is_never_trained_on(tmp_path: Path) -> None:
    """Asked for the very questions that are held out, the lab gives those after them."""
    extent = Extent(held_out=20)
    with joined("cpu") as world:
        lab = Lab(tmp_path, extent, world, lambda line: None)
    given = lab.questions(HELD_OUT, 5)
    assert not set(given) & set(lab.held_out(0))
    assert given == [question(random.Random(HELD_OUT + 20 + index)) for index in range(5)]
