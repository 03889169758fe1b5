"""The overview of a dataset for people."""

from common.progress import duration
from common.report import Table
from common.terminal import say, say_facts, say_table
from precompute.fleet.overview import Box, Overview

STYLES = {"at work": "", "silent": "yellow", "ended": "dim"}
HEADER = ("box", "state", "heard ago", "engines", "shards", "tok/s", "cost")
"""What fits 80 columns; `--json` has the rest."""
NAMED = 3
"""Silent boxes that a line names."""
RIGHT = tuple(range(2, len(HEADER)))


def show(found: Overview) -> None:
    """How far it is, who works on it, who has gone silent."""
    silent = found.standing("silent")
    say(f"{found.url}: {_headline(found)}", "green" if found.complete else "yellow" if silent else "")
    say_facts(_facts(found))
    if found.boxes:
        say_table(
            Table(HEADER, [_cells(box) for box in found.boxes]),
            {index: STYLES[box.standing] for index, box in enumerate(found.boxes)},
            right=RIGHT,
        )
    if silent and not found.complete:
        names = ", ".join(f"{box.status.box} ({duration(box.heard_s)})" for box in silent[:NAMED])
        more = f" and {len(silent) - NAMED} more" if len(silent) > NAMED else ""
        say(f"silent, perhaps gone: {names}{more}", "yellow")
        say("What they committed is safe; the same command, on any box, goes on")
    for name in found.unread:
        say(f"note: {name} is no status of this dataset that this release can read", "yellow")


def _headline(found: Overview) -> str:
    shards = f"{found.shards_committed:,}/{found.shards:,} shards ({found.shards_committed / found.shards:.0%})"
    if found.complete:
        return f"complete, {shards}"
    if not found.standing("at work"):
        whole = ", no manifest yet" if found.shards_committed == found.shards else ""
        return f"{shards}{whole}, nobody at work"
    left = "time left unknown" if found.eta_s is None else f"{duration(found.eta_s)} left"
    return f"{shards}, {found.tokens_per_s:,.0f} tok/s, {left}"


def _facts(found: Overview) -> list[tuple[str, str]]:
    counts = [f"{len(found.standing(which))} {which}" for which in STYLES if found.standing(which)]
    facts = [
        ("kind", found.kind),
        ("model", found.model),
        ("teacher", found.teacher or "-"),
        ("boxes", ", ".join(counts) or "none has told of itself"),
        ("last commit", "-" if found.last_commit_s is None else f"{duration(found.last_commit_s)} ago"),
        ("tokens made", f"{found.tokens:,}"),
        ("cost", _cost(found)),
    ]
    troubles = (
        ("rejected rows", found.rejected),
        ("engines died", found.deaths),
        ("storage retries", found.storage_retries),
    )
    return facts + [(name, f"{count:,}") for name, count in troubles if count]


def _cost(found: Overview) -> str:
    if found.cost is None:
        return "-"
    some = (
        f", of {found.boxes_with_price} of {len(found.boxes)} boxes"
        if found.boxes_with_price < len(found.boxes)
        else ""
    )
    return f"{found.cost:,.2f}{some}"


def _cells(box: Box) -> tuple[str, ...]:
    status = box.status
    running = sum(replica.state == "running" for replica in status.replicas)
    return (
        status.box,
        "silent" if box.standing == "silent" else status.state,
        duration(box.heard_s),
        f"{running}/{len(status.replicas)}" if box.standing == "at work" else "-",
        f"{status.shards_here:,}",
        f"{status.tokens_per_s:,.0f}" if box.standing == "at work" else "-",
        "-" if status.cost is None else f"{status.cost:,.2f}",
    )
