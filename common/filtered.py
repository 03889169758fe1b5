"""What filters of generation dropped, as the statistics of commits count it, in words."""

from collections.abc import Iterable, Mapping

DROPPED = {
    "dropped_truncated": "cut off at the token limit",
    "dropped_short": "too short",
    "dropped_long": "too long",
    "dropped_loop": "ending in a loop",
    "dropped_repetition": "repeating themselves",
    "dropped_duplicate": "equal to another of their prompt",
    "dropped_wrong": "found wrong",
    "dropped_unverified": "without a verdict",
    "dropped_extra": "more than were wanted of their prompt",
}
"""Statistics of a commit that count rows, each by the first filter that dropped it; in the order of the filters."""


def total(stats: Iterable[Mapping[str, float]], name: str) -> float | None:
    """A statistic over all shards; None where no shard has it."""
    found = [one[name] for one in stats if name in one]
    return sum(found) if found else None


def dropped(stats: Iterable[Mapping[str, float]]) -> dict[str, int]:
    """Rows dropped by each filter that was on, with the filter in words."""
    stats = list(stats)
    counts = {words: total(stats, name) for name, words in DROPPED.items()}
    return {words: round(count) for words, count in counts.items() if count is not None}
