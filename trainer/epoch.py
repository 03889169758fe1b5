"""The plan of an epoch: which rows make which micro-batch of which step. A pure function, the same on every rank.

Nothing here knows how many ranks there are, so a run resumes at another world size with the same batches, and the data
state of a run is two integers, (epoch, step).
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Bin: TypeAlias = tuple[int, ...]
"""Rows packed into one micro-batch."""
Step: TypeAlias = tuple[Bin, ...]
"""The bins of one optimizer step, the costly ones first."""


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
) -> list[Step]:
    """Every row exactly once, `rows_per_step` rows a step, packed into bins of at most `token_budget` tokens.

    Raises ValueError for a row longer than the budget; the caller knows its name.
    """
    if len(lengths) and lengths.max() > token_budget:
        raise ValueError(f"row {int(lengths.argmax())} has {lengths.max()} tokens, over the budget of {token_budget}")
    order = shuffled(shards, seed=seed, epoch=epoch, shuffle_shards=shuffle_shards)
    groups = (order[i : i + rows_per_step] for i in range(0, len(order), rows_per_step))
    return [_pack(group, lengths, token_budget) for group in groups]


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


def _pack(rows: np.ndarray, lengths: np.ndarray, budget: int) -> Step:
    """First-fit, longest rows first: within 22% of the fewest bins (Johnson 1973), and in practice within 2%."""
    bins: list[list[int]] = []
    room: list[int] = []
    for row in sorted(rows.tolist(), key=lambda row: -lengths[row]):
        length = int(lengths[row])
        fits = next((i for i, left in enumerate(room) if left >= length), None)
        if fits is None:
            fits = len(bins)
            bins.append([])
            room.append(budget)
        bins[fits].append(row)
        room[fits] -= length
    # Attention costs the square of a row's length; with the costly bins first the ranks' turns are alike.
    bins.sort(key=lambda bin: -sum(int(lengths[row]) ** 2 for row in bin))
    return tuple(tuple(bin) for bin in bins)


def turns(step: Step, rank: int, world: int) -> Sequence[Bin]:
    """The bins of `rank` in one step: step[rank::world], padded with empty bins to the same number on every rank.

    Every rank must run as many forward passes as the others: FSDP gathers the weights together or hangs.
    """
    mine = step[rank::world]
    return mine + ((),) * (-(-len(step) // world) - len(mine))
