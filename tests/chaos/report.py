"""A run as a table for people, and what to look at when it went wrong."""

from collections.abc import Iterator

from tests.chaos.audit import Tally
from tests.chaos.crew import Crew

EXAMPLES = 5
"""Of each kind of damage, so many are named."""


def table(crew: Crew, tally: Tally, seconds: float) -> str:
    """The run in lines of two columns."""
    return "\n".join(f"  {name:<34} {value:>8}" for name, value in _rows(crew, tally, seconds))


def _rows(crew: Crew, tally: Tally, seconds: float) -> Iterator[tuple[str, int]]:
    yield f"shards, in {len(crew.rounds)} datasets", tally.shards
    yield "kills (SIGKILL)", crew.ends["killed"]
    yield "interrupts (SIGINT)", crew.ends["interrupted"]
    yield "faults", sum(crew.faults.injected.values())
    for kind, count in sorted(crew.faults.injected.items()):
        yield f"  {kind}", count
    yield "requests", len(crew.faults.requests)
    yield "reads of a shard by the readers", tally.reads
    yield "  that ended in an error of ours", tally.refused
    for name in sorted({*crew.ends} - {"killed", "interrupted", "crashed", "hung"}):
        yield f"processes: {name}", crew.ends[name]
    yield "processes: foreign error", crew.ends["crashed"]
    yield "processes: hung", crew.ends["hung"]
    yield "orphans (harmless)", tally.orphans
    yield "lost", len(tally.lost)
    yield "duplicated", len(tally.duplicated)
    yield "corrupt accepted", len(tally.corrupt)
    yield "seconds", round(seconds)


def details(crew: Crew, tally: Tally) -> str:
    """Examples of the damage, and the ends of the foreign errors' tracebacks."""
    lines = [
        f"  {name}: {entry}"
        for name, entries in (("lost", tally.lost), ("duplicated", tally.duplicated), ("corrupt", tally.corrupt))
        for entry in sorted(entries)[:EXAMPLES]
    ]
    ends = [log.read_text(errors="replace").strip().rpartition("\n")[2] for log in crew.crashes]
    lines += [f"  foreign error: {end}" for end in sorted({*ends})[:EXAMPLES]]
    return "".join(f"\n{line}" for line in lines)
