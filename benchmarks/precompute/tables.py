"""The rows of `benchmarks.precompute` as tables for people, and which goals they reach."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import click

from benchmarks.precompute.sides import BARE, OURS, Row
from common.report import Table
from common.terminal import say_table

PHASES = {"rollouts": "Rollouts", "score": "Scores"}
STRETCHES = ("start_s", "fill_s", "steady_s", "end_s")
"""Of one run: until the first request, until as many rows as the engine holds are out, until all are, until the end."""
SPEED_GOAL, FLAT_GOAL = 0.97, 1.25


def say_tables(found: Mapping[str, Any]) -> None:
    """Print what `benchmarks.precompute` found."""
    machine, extent, rows = found["machine"], found["machine"]["extent"], found["rows"]
    threads = f", {machine['threads']} threads a side" if machine["threads"] else ""
    click.echo(
        f"{machine['model']} in {machine['engine']}; {machine['gpu'] or machine['cpu']}, {machine['cores']} cores, "
        f"load {machine['load']:.1f} at the start{threads}"
    )
    timed = [row for row in rows if row["times"] == extent["timed"]]
    for phase, name in PHASES.items():
        own = [row for row in timed if row["phase"] == phase]
        title = f"{name}: {own[0]['rows']:,} rows, completions of {own[0]['tokens'] / own[0]['rows']:.0f} tokens"
        _say(f"{title}, median of {extent['rounds']} (least to most)", speed_table(own))
    _say("CPU seconds a thousand completion tokens, when the engine is full", cpu_table(timed))
    _say("Peak memory, MB: of the supervisor, and of all else above what it held at the first request",
         memory_table(rows, extent["times"]))  # fmt: skip
    _say("Goals, of which a tiny network says nothing" if machine["quick"] else "Goals", goals_table(rows, extent))


def speed_table(rows: Sequence[Row]) -> Table:
    """A line a side, of one phase: completion tokens a second, and ours to it in the same round."""
    lines = []
    for side in _sides(rows):
        runs = [row for row in rows if row["side"] == side]
        lines.append((
            side,
            *_beside(rows, side, steady),
            *_beside(rows, side, whole),
            *(f"{median(row[key] for row in runs):.1f}" for key in STRETCHES),
        ))  # fmt: skip
    header = ("side", "tok/s", "spread", "ours to it", "whole run", "spread", "ours to it")
    return Table((*header, "start s", "fill s", "steady s", "end s"), lines)


def cpu_table(rows: Sequence[Row]) -> Table:
    """A line a phase and a side: by process, then all of them, then those of the whole run, start and end included."""
    lines = []
    for phase in PHASES:
        own = [row for row in rows if row["phase"] == phase]
        for side in _sides(own):
            runs = [row for row in own if row["side"] == side]
            keys = ("supervisor_cpu_s", "worker_cpu_s", "engine_cpu_s")
            costs = [median(row[key] / row["steady_tokens"] * 1000 for row in runs) for key in keys]
            whole_run = median(row["whole_cpu_s"] / row["tokens"] * 1000 for row in runs)
            lines.append((phase, side, *(f"{cost:.4f}" for cost in (*costs, sum(costs), whole_run))))
    return Table(("phase", "side", "supervisor", "worker", "engine's own", "together", "whole run"), lines)


def memory_table(rows: Sequence[Row], times: Sequence[int]) -> Table:
    """A line a phase and a side that ran at every size."""
    lines = []
    for phase in PHASES:
        own = [row for row in rows if row["phase"] == phase]
        for side in (side for side in _sides(own) if _sizes(own, side) >= {*times}):
            found = [_memory(own, side, size) for size in times]
            supervisor = [f"{held / 1e6:,.0f}" if side == OURS else "" for held, _ in found]
            lines.append((phase, side, *supervisor, *(f"{above / 1e6:,.0f}" for _, above in found)))
    sizes = [f"x{size}" for size in times]
    return Table(("phase", "side", *(f"supervisor {size}" for size in sizes), *(f"else {s}" for s in sizes)), lines)


def goals_table(rows: Sequence[Row], extent: Mapping[str, Any]) -> Table:
    """What was to be reached, and what was."""
    lines = []
    for phase in PHASES:
        own = [row for row in rows if row["phase"] == phase]
        timed = [row for row in own if row["times"] == extent["timed"]]
        for side in _sides(timed):
            if side == OURS:
                continue
            share, wanted = median(_ratios(timed, side, steady)), SPEED_GOAL if side == BARE else 1.0
            sign = ">=" if side == BARE else ">"
            lines.append(_goal(f"{phase}: tok/s to {side}", f"{share:.3f}x", f"{sign} {wanted:g}x", share >= wanted))
        smallest, largest = (_memory(own, OURS, extent["times"][end]) for end in (0, -1))
        for what, low, high in zip(("supervisor", "all else"), smallest, largest, strict=True):
            growth = high / low if low else float("inf")
            goal = f"{phase}: memory of {what}, x{extent['times'][-1]} rows to x{extent['times'][0]}"
            lines.append(_goal(goal, f"{growth:.2f}x", f"<= {FLAT_GOAL}x", growth <= FLAT_GOAL))
    return Table(("goal", "", "found", "wanted"), lines)


def steady(row: Row) -> float:
    """Completion tokens a second, once as many rows as the engine holds have left it, to the last."""
    return row["steady_tokens"] / row["steady_s"]


def whole(row: Row) -> float:
    """The same from the start of the command to its end: the last shard stored, or the file written."""
    return row["tokens"] / sum(row[key] for key in STRETCHES)


def _beside(rows: Sequence[Row], side: str, rate: Any) -> tuple[str, str, str]:
    rates = [rate(row) for row in rows if row["side"] == side]
    ratio = "" if side == OURS else f"{median(_ratios(rows, side, rate)):.3f}x"
    return f"{median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}", ratio


def _ratios(rows: Sequence[Row], side: str, rate: Any) -> list[float]:
    """Ours to `side`, each round by itself: a machine that slows down slows both."""
    ours, theirs = ({row["round"]: rate(row) for row in rows if row["side"] == one} for one in (OURS, side))
    return [ours[turn] / theirs[turn] for turn in ours]


def _memory(rows: Sequence[Row], side: str, times: int) -> tuple[int, int]:
    """Bytes of the supervisor, and of all else above what it held when it was given its first request."""
    own = [row for row in rows if (row["side"], row["times"]) == (side, times)]
    above = max(row["worker_peak_bytes"] - row["worker_ready_bytes"] for row in own)
    return max(row["supervisor_peak_bytes"] for row in own), above


def _sizes(rows: Sequence[Row], side: str) -> set[int]:
    return {row["times"] for row in rows if row["side"] == side}


def _sides(rows: Iterable[Row]) -> list[str]:
    return list({row["side"]: None for row in rows})


def _goal(what: str, found: str, wanted: str, reached: bool) -> tuple[str, str, str, str]:
    return (what, "reached" if reached else "MISSED", found, wanted)


def _say(title: str, table: Table) -> None:
    click.echo(f"\n{title}\n")
    say_table(table, right=range(1, len(table.header)))
