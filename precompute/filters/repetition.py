"""How much a completion repeats itself: two measures over token ids, exact and without any model."""

import numpy as np

LOOP_TIMES = 4
"""A loop says the same tokens at least so many times in a row,"""
LOOP_TOKENS = 64
"""and lasts at least so many tokens: a row of dashes, or a number's zeros, is none."""


def repeated_share(ids: np.ndarray, n: int) -> float:
    """The share of n-grams of a completion that stood in it before: 1 - distinct / all, from 0 to below 1.

    This is seq-rep-n of Welleck et al. (2019, arXiv 1908.04319). Ordinary text has a few percent of its 4-grams, long
    chains of thought up to a half, a text that is stuck nearly all.

    Args:
        ids: (tokens,) integers. Fewer than n + 1 have nothing to repeat: 0.
    """
    count = len(ids) - n + 1
    if count < 2:
        return 0.0
    names = np.unique(ids, return_inverse=True)[1].astype(np.int64)
    grams = names[:count]
    for place in range(1, n):  # n-grams are numbered by (number of the (n-1)-gram, next token)
        pairs = grams * (len(ids) + 1) + names[place : place + count]
        grams = np.unique(pairs, return_inverse=True)[1]
    return 1 - (int(grams.max()) + 1) / count


def loop_at_end(ids: np.ndarray) -> int:
    """Tokens of the loop in which a completion ends; 0 for none.

    A loop is a stretch of at least `LOOP_TOKENS` tokens, up to the last one, in which a pattern of any length stands at
    least `LOOP_TIMES` times in a row, the last time perhaps in part.

    Args:
        ids: (tokens,) integers, without the token that ended the completion.
    """
    for period in _candidates(ids):
        differs = np.flatnonzero(ids[period:] != ids[:-period])
        lasts = len(ids) - (int(differs[-1]) + 1 if len(differs) else 0)
        if lasts >= max(LOOP_TOKENS, LOOP_TIMES * period):
            return lasts
    return 0


def _candidates(ids: np.ndarray) -> list[int]:
    """Periods that the last tokens have, shortest first: where all of the last ones stood once before."""
    last = len(ids) - 1
    periods = np.arange(1, len(ids) // LOOP_TIMES + 1)
    for back in range(min(LOOP_TOKENS - LOOP_TOKENS // LOOP_TIMES, last)):
        periods = periods[last - back - periods >= 0]
        periods = periods[ids[last - back - periods] == ids[last - back]]
        if not len(periods):
            break
    return periods.tolist()
