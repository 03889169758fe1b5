"""How fast a dataset grows, told by the times of its commits."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RECENT_COMMITS = 50
"""Commits of which the present pace is told."""
PATIENCE_S = 600.0
"""Silence in which nothing is called stalled: an engine takes minutes to start, and a shard may take as long."""
LEAST_SPAN_S = 30.0
"""Commits nearer together than this are one burst, of shards that ran side by side, and tell no pace."""
LONG_PAUSE = 5
"""A gap so many times the usual one, and longer than `PATIENCE_S`, parts two runs."""


@dataclass(frozen=True)
class Pace:
    """How fast shards are committed, in shards per minute; None where the times do not tell."""

    recent: float | None
    """Since the last long pause, over the last `RECENT_COMMITS` at most."""
    overall: float | None
    """From the plan to the last commit, pauses included."""
    last: float | None
    """When the last commit was made, in seconds since the epoch by the store's clock."""
    stalled: bool
    """Whether the silence since then is longer than the pace lets expect."""


def pace_of(plan_written: float, commits: Sequence[float], now: float) -> Pace:
    """The pace of a job by the times of its commits, all in seconds since the epoch.

    A store may tell times by whole seconds, and two clocks may differ: what comes out negative counts as nothing.
    """
    times = sorted(commits)
    if not times:
        return Pace(None, None, None, stalled=now - plan_written > 3 * PATIENCE_S)
    run = _last_run(times)[-RECENT_COMMITS:]
    gaps = [after - before for before, after in zip(run, run[1:], strict=False)]
    longest = max(gaps, default=PATIENCE_S)
    return Pace(
        recent=_per_minute(len(gaps), run[-1] - run[0]) if run[-1] - run[0] >= LEAST_SPAN_S else None,
        overall=_per_minute(len(times), times[-1] - plan_written) if plan_written else None,
        last=times[-1],
        stalled=now - times[-1] > max(PATIENCE_S, 3 * longest),
    )


def _last_run(times: list[float]) -> list[float]:
    """The times after the last long pause."""
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    long = max(PATIENCE_S, LONG_PAUSE * statistics.median(gaps)) if gaps else 0.0
    pauses = [index for index, gap in enumerate(gaps) if gap > long]
    return times[pauses[-1] + 1 :] if pauses else times


def _per_minute(count: int, seconds: float) -> float | None:
    return 60 * count / seconds if count and seconds > 0 else None
