"""Rows and tokens that are committed so far, when there is no manifest yet to say so."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.progress import followed
from common.records import read_commits
from common.storage import Store


@dataclass(frozen=True)
class Tally:
    """Counts over the committed shards."""

    rows: int
    tokens: int
    estimated: bool
    """Whether they are projected from a sample."""


def count_commits(store: Store, shards: Sequence[int], at_most: int | None, progress: bool = False) -> Tally:
    """Rows and completion tokens of the committed `shards`.

    Args:
        at_most: commits to read; of more shards, a sample spread evenly over them stands for all. None reads all.
        progress: whether to show how far it is.

    Raises:
        DataError, NotFound: a commit is altered or gone.
    """
    step = 1 if at_most is None else max(1, -(-len(shards) // at_most))
    sample = shards[::step]
    commits = read_commits(store, sample)
    if progress:
        commits = followed(commits, "reading commits", len(sample), "commits")
    counts = [(commit.rows, commit.tokens) for commit in commits]
    rows, tokens = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    if len(sample) == len(shards):
        return Tally(rows, tokens, estimated=False)
    scale = len(shards) / len(sample)
    return Tally(round(rows * scale), round(tokens * scale), estimated=True)
