"""What filters of generation dropped, as the statistics of commits count it, in words."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

DROPPED = {
    "dropped_truncated": "cut off at the token limit",
    "dropped_short": "too short",
    "dropped_long": "too long",
    "dropped_loop": "ending in a loop",
    "dropped_repetition": "repeating themselves",
    "dropped_duplicate": "equal to another of their prompt",
    "dropped_wrong": "found wrong",
    "dropped_unverified": "without a verdict",
    "dropped_extra": "beyond those wanted a prompt",
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


def dropped_text(stats: Iterable[Mapping[str, float]]) -> str:
    """The same on one line; empty where no filter was on."""
    return ", ".join(f"{count:,} {words}" for words, count in dropped(stats).items())


def filters_text(filters: Mapping[str, Any]) -> str:
    """The filters of a plan that are on, on one line."""
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in filters.items() if value not in (None, False))
