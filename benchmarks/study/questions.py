"""Who is asked what: questions by number, in ranges that do not meet, and those kept back for measuring."""

import random
from collections.abc import Iterator
from functools import cache
from itertools import islice

from benchmarks.study.setting.task import Question, question

HELD_OUT, ANSWERED, ANSWERED_AFRESH, ROLLED_OUT, LIVE = 10**6, 2 * 10**6, 25 * 10**5, 3 * 10**6, 5 * 10**6
"""Where the numbers of the questions begin, for measuring, SFT, more SFT, precompute and live distillation."""
BETWEEN = 10**5
"""Numbers that each seed of the study has for its own."""
MOST_SEEDS = 10


@cache
def held_out(seed: int, count: int) -> tuple[Question, ...]:
    """Those on which everything of this seed is measured."""
    return tuple(islice(_from(HELD_OUT + seed * BETWEEN), count))


def to_train_on(first: int, count: int, kept_back: int) -> list[Question]:
    """So many questions from number `first` on, without the `kept_back` held out for each seed."""
    without = _kept_back(kept_back)
    return list(islice((one for one in _from(first) if one not in without), count))


@cache
def _kept_back(count: int) -> frozenset[Question]:
    return frozenset(one for seed in range(MOST_SEEDS) for one in held_out(seed, count))


def _from(number: int) -> Iterator[Question]:
    while True:
        yield question(random.Random(number))
        number += 1
