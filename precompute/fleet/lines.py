"""A status in plain words: the line that a log gets now and then, and what of a change is worth a line."""

from collections import defaultdict
from collections.abc import Mapping

from common.progress import duration
from common.untrusted import one_line
from precompute.fleet.status import ReplicaState, ReplicaStatus, Status

LABELS = {"sft_data": "sampling answers", "rollouts": "sampling rollouts", "score": "scoring"}
ENDED = ("complete", "stopped", "failed")
"""States after which nothing more comes."""
WAITING = ("starting", "loading", "testing", "draining")
"""States of a replica in which the question is for how long already."""
WORTH_A_LINE = ("loading", "testing", "running", "ended")
NAMED = 4
"""Replicas that a line names."""


def line_of(status: Status, seconds: Mapping[str, float]) -> str:
    """How the phase stands, on one line.

    Args:
        seconds: how long each replica, by its name, has been in its state.
    """
    parts = [] if status.state == "running" else [status.state]
    parts += [f"{status.shards_done}/{status.shards_total} shards ({_share(status):.0%})"]
    parts += speed_of(status)
    parts += [waiting_of(status, seconds)] if status.state not in ENDED else []
    parts += [*costs_of(status), *troubles_of(status)]
    line = ", ".join(part for part in parts if part)
    return f"{line}: {one_line(status.reason)}" if status.reason else line


def speed_of(status: Status) -> list[str]:
    """Tokens a second and time left; of a phase that is over, what came out and how long it took."""
    if status.state in ENDED:
        return [f"{status.tokens:,} tokens here", f"took {duration(status.seconds)}"]
    if not status.tokens:
        return [f"{duration(status.seconds)} so far"]
    left = "time left unknown" if status.eta_s is None else f"{duration(status.eta_s)} left"
    return [f"{status.tokens_per_s:,.0f} tok/s", left]


def costs_of(status: Status) -> list[str]:
    """What it has cost, and what share of the rows was cut off."""
    parts = [] if status.cost is None else [f"cost {status.cost:,.2f}"]
    return parts if status.truncated is None else [*parts, f"{status.truncated:.1%} truncated"]


def troubles_of(status: Status) -> list[str]:
    """What went wrong and was dealt with; nothing of what did not happen."""
    counts = [(status.deaths, "death"), (status.rejected, "rejected"), (status.storage_retries, "storage retry")]
    return [_counted(count, name) for count, name in counts if count]


def waiting_of(status: Status, seconds: Mapping[str, float]) -> str:
    """`2 of 3 replicas running, 1 loading (1m20s)`; nothing when all run."""
    states: dict[ReplicaState, list[ReplicaStatus]] = defaultdict(list)
    for replica in status.replicas:
        states[replica.state].append(replica)
    running = len(states.pop("running", []))
    if not states:
        return ""
    parts = [f"{running} of {len(status.replicas)} replicas running"] if running else []
    for state, replicas in states.items():
        longest = max(seconds.get(replica.name, 0.0) for replica in replicas)
        parts.append(f"{len(replicas)} {state}" + (f" ({duration(longest)})" if state in WAITING else ""))
    return ", ".join(parts) if running else f"replicas: {', '.join(parts)}"


def changes(before: Status | None, after: Status) -> list[str]:
    """A line for each new state that some replicas have come to; turns of a running engine are none."""
    was = {replica.name: replica for replica in (before.replicas if before else ())}
    came: dict[tuple[ReplicaState, str], list[ReplicaStatus]] = defaultdict(list)
    for replica in after.replicas:
        old = was.get(replica.name)
        known = old.state if old else "starting"
        fresh = old is not None and not (old.rows or old.in_engine)
        waited = fresh and known in ("idle", "storing")  # for its first shard
        turn = replica.state == "running" and not waited and known not in ("starting", "loading", "testing")
        if replica.state != known and replica.state in WORTH_A_LINE and not turn:
            came[replica.state, replica.detail].append(replica)
    return [_change(state, detail, replicas) for (state, detail), replicas in came.items()]


def _change(state: ReplicaState, detail: str, replicas: list[ReplicaStatus]) -> str:
    names = ", ".join(f"{one_line(one.name)} ({one_line(one.devices)})" for one in replicas[:NAMED])
    more = f" and {len(replicas) - NAMED} more" if len(replicas) > NAMED else ""
    what = f"{state}, {one_line(detail)}" if detail else state
    return f"{'replicas' if len(replicas) > 1 else 'replica'} {names}{more}: {what}"


def _counted(count: int, name: str) -> str:
    """`1 death`, `2 deaths`, `3 rejected`, `2 storage retries`."""
    if count == 1 or name == "rejected":
        return f"{count:,} {name}"
    return f"{count:,} {name[:-1]}ies" if name.endswith("y") else f"{count:,} {name}s"


def _share(status: Status) -> float:
    return status.shards_done / status.shards_total if status.shards_total else 1.0
