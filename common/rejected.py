"""Rows that nobody could make: an engine died of them, or never gave what was asked. A commit names each of them.

What a filter drops is no rejected row: it was made, counted in the statistics of its shard, and not wanted.
"""

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from common.config import Frozen

REASON = 500
"""Characters of a reason, at most."""
NAMED = 3
"""Rows, and reasons, that are named."""


class Rejected(Frozen):
    """A row that is not in its shard, and that nobody tries again."""

    uid: str
    reason: Annotated[str, Field(min_length=1, max_length=REASON)]


def rejected_lines(rejected: Iterable[Rejected]) -> list[str]:
    """How many rows, and why: a line for each of the most frequent reasons, with some uids; none for no row."""
    by_reason: dict[str, list[str]] = {}
    for row in rejected:
        by_reason.setdefault(row.reason, []).append(row.uid)
    often = sorted(by_reason.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    lines = [f"{len(uids):,} by the reason: {reason} ({_some(uids)})" for reason, uids in often[:NAMED]]
    if often[NAMED:]:
        lines.append(f"{sum(len(uids) for _, uids in often[NAMED:]):,} for {len(often) - NAMED} other reasons")
    return lines


def _some(uids: list[str]) -> str:
    return ", ".join(uids[:NAMED]) + (f" and {len(uids) - NAMED:,} more" if uids[NAMED:] else "")
