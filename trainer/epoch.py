"""The plan of an epoch: which rows make which micro-batch of which step. A pure function, the same on every rank.

Which rows make a step depends on nothing but the data and the seed, so a run resumes at another number of ranks with
the same batches, and the data state of a run is two integers, (epoch, step). Only how a step's rows are laid into bins
depends on the ranks: there are as many bins for each of them, of equal work.

Why equal and not full. A packed sequence has no padding, so a part-empty bin wastes nothing, whereas under FSDP the
ranks gather every layer together: a round of passes lasts as long as its costliest bin, and a rank without one waits.
Share of the ranks' time that is work by the cost below (steps of 256 rows, budget 16384), bins of first-fit dealt out
-> these:

    lengths (mean)                   fill, 1 rank    2 ranks         8 ranks         16 ranks
    520 SmolLM2 rollouts (356)       93%             93% -> 100%     69% -> 100%     35% -> 100%
    lognormal, to 4096 (1800)        98%             98% -> 100%     88% -> 100%     86% -> 100%
    lognormal, to 16384 (1100)       97%             96% -> 99%      74% -> 92%      55% -> 76%
    long reasoning, to 16384 (6700)  99%             99% -> 99%      96% -> 97%      92% -> 96%

Fill is tokens / (bins x budget) with the fewest bins; a step of the first has 5.6 bins of tokens, which make six. What
is lost in the third line is one row of 16384 tokens, which no plan can divide.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

Bin: TypeAlias = tuple[int, ...]
"""Rows packed into one micro-batch."""
Step: TypeAlias = tuple[Bin, ...]
"""The bins of one optimizer step, the costly ones first."""

ATTENTION_LENGTH = 24_576
"""Length of a row at which attention costs as much as all else: 6 N flops a token against 6 x layers x width x length,
with N = 12 x layers x width^2 parameters, so 12 x width, here for a width of 2048. Where 9,000 or 60,000 were right,
the table above would lose 0.3% in its second line and 2.3% in its last, so no model needs its own."""

MISFITS = 16
"""Bins tried for a row: with all tried, a single step of a million rows would take minutes."""


class Quality(NamedTuple):
    """How good a plan is; shares from 0 to 1."""

    passes: float  # forward passes a step, over all ranks
    fill: float  # tokens / (passes x budget)
    balance: float  # work / (ranks x the longest turn of each round): what is missing to 1 the ranks wait


def steps_per_epoch(rows: int, rows_per_step: int) -> int:
    """Number of optimizer steps in an epoch; the last takes the rows that are left."""
    return -(-rows // rows_per_step)


def plan(
    lengths: np.ndarray,  # (rows,) prompt + completion tokens
    shards: np.ndarray,  # (rows,) the shard each row lies in
    *,
    seed: int,
    epoch: int,
    token_budget: int,
    rows_per_step: int,
    shuffle_shards: int,
    ranks: int,
) -> list[Step]:
    """Every row exactly once, `rows_per_step` rows a step, packed into bins of at most `token_budget` tokens.

    Takes about 3 s for a million rows; whoever reads along packs step by step (`step_rows`, `pack`).

    Raises:
        ValueError: a row is longer than the budget; the caller knows its name.
    """
    order = shuffled(shards, seed=seed, epoch=epoch, shuffle_shards=shuffle_shards)
    return [pack(rows, lengths, token_budget, ranks) for rows in step_rows(order, rows_per_step)]


def shuffled(shards: np.ndarray, *, seed: int, epoch: int, shuffle_shards: int) -> np.ndarray:
    """Row numbers in the epoch's order: shards at random, rows at random within windows of `shuffle_shards` shards.

    The window is what bounds the reader's memory; with no more shards than that the shuffle is a full one. The keys
    come from the bit generator itself, the only stream numpy promises never to change.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    names, shard_of_row = np.unique(shards, return_inverse=True)
    rank_of_shard = np.argsort(np.argsort(keys.random_raw(len(names)), kind="stable"), kind="stable")
    window = rank_of_shard[shard_of_row] // shuffle_shards  # (rows,)
    return np.lexsort((keys.random_raw(len(shards)), window))


def step_rows(order: np.ndarray, rows_per_step: int) -> list[np.ndarray]:
    """The rows of each step of an epoch, from its order."""
    return [order[start : start + rows_per_step] for start in range(0, len(order), rows_per_step)]


def pack(rows: np.ndarray, lengths: np.ndarray, budget: int, ranks: int) -> Step:
    """The rows of a step in bins of at most `budget` tokens: the fewest for each rank, the same number, of equal cost.

    Equal where the room allows it: rows go to the cheapest bin, costliest first (LPT, Graham 1969); where that has no
    room for one, the bins stay as best-fit found them. Raises ValueError for a row longer than the budget.
    """
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    sizes = lengths[rows].tolist()
    if sizes and sizes[0] > budget:
        raise ValueError(f"row {rows[0]} has {sizes[0]} tokens, over the budget of {budget}")
    fewest = _best_fit(sizes, budget)
    count = min(-(-len(fewest) // ranks) * ranks, len(rows))
    bins = _spread(sizes, count, budget) or fewest
    bins.sort(key=lambda bin: -sum(_cost(sizes[index]) for index in bin))
    numbers = rows.tolist()
    return tuple(tuple(numbers[index] for index in bin) for bin in bins)


def turns(step: Step, rank: int, ranks: int) -> Sequence[Bin]:
    """The bins of `rank` in one step, one a round, with an empty one where it has none.

    Every rank must run as many forward passes as the others: FSDP gathers the weights together or hangs. A round holds
    bins that cost alike, and every other round is dealt in the reverse order, so that no rank has always the costliest.
    """
    padded = step + ((),) * (-len(step) % ranks)
    rounds = [padded[start : start + ranks] for start in range(0, len(padded), ranks)]
    return tuple(bins[rank] if number % 2 == 0 else bins[-1 - rank] for number, bins in enumerate(rounds))


def quality(steps: Iterable[Step], lengths: np.ndarray, budget: int, ranks: int) -> Quality:
    """The figures of a plan over `steps`."""
    count, passes, tokens, work, lasting = 0, 0, 0, 0, 0
    for step in steps:
        sizes = [lengths[list(bin)].tolist() for bin in step]
        costs = [sum(map(_cost, bin)) for bin in sizes]
        count, tokens, work = count + 1, tokens + sum(map(sum, sizes)), work + sum(costs)
        longest = costs[::ranks]  # of each round: costly bins come first
        passes, lasting = passes + ranks * len(longest), lasting + sum(longest)
    return Quality(passes / max(count, 1), tokens / max(passes * budget, 1), work / max(ranks * lasting, 1))


def _cost(length: int) -> int:
    """Work of a row up to a factor: linear in its length, and attention on top. In integers, so exact everywhere."""
    return length * (ATTENTION_LENGTH + length)


def _best_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of indices into `sizes` (descending), each put where it leaves the least room: within 22% of the fewest bins
    (Johnson 1973), and measured within 1%."""
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room, bin), ascending; those too full for the shortest row are left out
    for index, size in enumerate(sizes):
        place = bisect_left(open_bins, (size, -1))
        room, number = open_bins.pop(place) if place < len(open_bins) else (budget, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        if room - size >= sizes[-1]:
            insort(open_bins, (room - size, number))
    return bins


def _spread(sizes: Sequence[int], count: int, budget: int) -> list[list[int]] | None:
    """`count` bins of indices into `sizes` (descending), each put into the cheapest that has room; None where the
    cheapest `MISFITS` have none."""
    bins: list[list[int]] = [[] for _ in range(count)]
    room = [budget] * count
    cheapest = [(0, number) for number in range(count)]  # a heap of (cost, bin)
    for index, size in enumerate(sizes):
        misfits = []
        while room[cheapest[0][1]] < size:
            misfits.append(heapq.heappop(cheapest))
            if len(misfits) == MISFITS or not cheapest:
                return None
        cost, number = cheapest[0]
        heapq.heapreplace(cheapest, (cost + _cost(size), number))
        bins[number].append(index)
        room[number] -= size
        for misfit in misfits:
            heapq.heappush(cheapest, misfit)
    return bins
