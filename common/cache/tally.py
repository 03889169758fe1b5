"""Rows and tokens that are committed so far, when there is no manifest yet to say so."""

from dataclasses import dataclass

from common.cache.contents import Contents, lost_shards
from common.progress import followed
from common.records import read_commits
from common.storage import Store

NAMED = 3
"""Shards that are named at most."""


@dataclass(frozen=True)
class Tally:
    """Counts over the committed shards."""

    rows: int
    tokens: int
    estimated: bool
    """Whether they are projected from a sample."""
    lost: tuple[int, ...]
    """Committed shards whose object is gone or of another size: of the sample by its commits, of the rest by names."""

    @property
    def problem(self) -> str | None:
        """What is wrong with the dataset."""
        some = ", ".join(str(shard) for shard in self.lost[:NAMED]) + (", ..." if self.lost[NAMED:] else "")
        return f"{len(self.lost)} committed shards are missing or have another size: {some}" if self.lost else None


def count_commits(store: Store, contents: Contents, at_most: int | None, progress: bool = False) -> Tally:
    """Rows and completion tokens of the committed shards, and which of them have lost their objects.

    Args:
        at_most: commits to read; of more shards, a sample spread evenly over them stands for all. None reads all.
        progress: whether to show how far it is.

    Raises:
        DataError, NotFound: a commit is altered or gone.
    """
    shards = sorted(contents.commits)
    step = 1 if at_most is None else max(1, -(-len(shards) // at_most))
    sample = shards[::step]
    commits = read_commits(store, sample)
    if progress:
        commits = followed(commits, "reading commits", len(sample), "commits")
    stored = {name: entry.size for name, entry in contents.data.items()}
    rows, tokens, lost = 0, 0, {*lost_shards(contents)}
    for commit in commits:
        rows, tokens = rows + commit.rows, tokens + commit.tokens
        lost |= {commit.shard} if stored.get(commit.file) != commit.bytes else set()
    scale = len(shards) / len(sample) if sample else 1
    return Tally(round(rows * scale), round(tokens * scale), len(sample) < len(shards), tuple(sorted(lost)))
