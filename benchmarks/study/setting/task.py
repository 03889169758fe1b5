"""The task: running sums of labelled digits, with a chain of thought and two habits of writing it.

A prompt names digits in any order, `c9a3d4=`. An answer goes through the labels one by one, writes the sum so far,
modulo ten, after each, then the total: `a3,c2;d6#6$`. Teacher A goes up the alphabet, teacher B down; each does so most
of the time only, and chooses its separators and now and then a wrong digit by chance, so that neither is one-hot. Both
orders give the same total: equal skill, different habits.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LABELS = "abcdefgh"
DIGITS = "0123456789"
BASE = len(DIGITS)
SEPARATORS, SEPARATOR_SHARES = ",;/", (0.6, 0.3, 0.1)
TOTAL, END, ASK = "#", "$", "="
ALPHABET = LABELS + DIGITS + SEPARATORS + TOTAL + END + ASK
FEWEST, MOST = 4, len(LABELS)
LONGEST_PROMPT = 2 * MOST + 1
LONGEST_ANSWER = 3 * MOST + 2
"""Tokens of an answer of the usual form: label, digit and separator for each number, `#`, the total and `$`."""
KEPT = 0.85
"""How often the next label is the one the habit asks for; else any that is left."""
SLIP = 0.02
"""How often a sum so far is off by one."""

Habit = Literal["up", "down", "any"]


@dataclass(frozen=True)
class Question:
    """Labelled digits, in the order in which they are shown."""

    numbers: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        return "".join(f"{label}{DIGITS[digit]}" for label, digit in self.numbers) + ASK

    @property
    def answer(self) -> str:
        return DIGITS[sum(digit for _, digit in self.numbers) % BASE]


def question(draw: random.Random, fewest: int = FEWEST, most: int = MOST) -> Question:
    """A question at random of so many numbers; there are more than 10^13."""
    labels = draw.sample(LABELS, draw.randint(fewest, most))
    return Question(tuple((label, draw.randrange(BASE)) for label in labels))


def chain(asked: Question, habit: Habit, draw: random.Random) -> str:
    """An answer as somebody of this habit writes it."""
    left, total, written = dict(asked.numbers), 0, list[str]()
    while left:
        label = _next(sorted(left), habit, draw)
        total += left.pop(label)
        if draw.random() < SLIP:
            total += draw.choice((-1, 1))
        separator = draw.choices(SEPARATORS, SEPARATOR_SHARES)[0] if left else ""
        written.append(f"{label}{DIGITS[total % BASE]}{separator}")
    return f"{''.join(written)}{TOTAL}{DIGITS[total % BASE]}{END}"


def is_right(completion: str, answer: str) -> bool:
    """Whether a completion ends with this total."""
    return completion.endswith(f"{TOTAL}{answer}{END}")


def _next(left: Sequence[str], habit: Habit, draw: random.Random) -> str:
    if habit == "any" or draw.random() >= KEPT:
        return draw.choice(left)
    return left[0] if habit == "up" else left[-1]
