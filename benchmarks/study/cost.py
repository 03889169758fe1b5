"""Claim (e): the device-seconds of a trained token, live and with Lightning, all of its precompute counted."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.results.findings import Finding, Row
from benchmarks.study.results.statistics import Mean
from benchmarks.study.runs import IMPORTANCE_A, LIVE_A, PAPER_A, Runs

PARTS = ("weights", "rollouts", "scoring", "training")
GOAL = 4.0
"""Of live / Lightning, from the paper's 120 and 30 GPU-hours."""


def cost(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    """One part at a time has the whole machine, in live distillation too, so seconds are device-seconds."""
    last = stops[-1]
    live = [_per_token(run.arms[LIVE_A][-1]["parts"]) for run in runs]
    ways = {
        "each rollout trained on once": [_lightning(run, run.rollouts["tokens"]) for run in runs],
        f"{last} steps on one dataset": [_lightning(run, run.arms[PAPER_A][-1]["trained"]) for run in runs],
    }
    ratios = {
        name: Mean.of([sum(a.values()) / sum(b.values()) for a, b in zip(live, costs, strict=True)])
        for name, costs in ways.items()
    }
    rows = [
        _cost_row("live", live),
        *(_cost_row(f"Lightning, {name}", costs, ratios[name]) for name, costs in ways.items()),
    ]
    starts = Mean.of([run.rollouts["seconds"] + run.scores["seconds"] for run in runs])
    works = Mean.of([run.rollouts["working_s"] + run.scores["working_s"] for run in runs])
    once, least = ratios.values()
    return Finding(
        key="e",
        title=f"Device-seconds per trained token: live / Lightning of at least {GOAL}",
        question="How much machine time does a trained token cost, all of Lightning's own precompute counted?",
        columns={
            "weights": "weights to the engine, ms/token",
            "rollouts": "rollouts",
            "scoring": "scoring",
            "training": "training",
            "total": "all",
            "ratio": "live / this",
            "equal": f"to live's accuracy after {stops[0]} steps",
        },
        rows=[*rows, *_to_equal_accuracy(runs, stops)],
        verdict="holds" if least.low >= GOAL else "does not hold" if least.high < GOAL else "not shown",
        answer=f"Live takes {least} times the device-seconds of Lightning where {last} steps are taken on one dataset, "
        f"and {once} times where each rollout is trained on once. A token costs both the same work; what Lightning "
        "saves is doing it again for every further epoch, and for every further run on the same dataset, which pays "
        f"for none of it. The start of the engines is left out on both sides: precompute took {works} s at work and "
        f"{starts} s in all. Not counted, for one part at a time has the machine here: a teacher's GPUs that are idle "
        "while a live student samples and trains.",
        seeds=seeds,
        timing=True,
    )


def _to_equal_accuracy(runs: Sequence[Runs], stops: Sequence[int]) -> list[Row]:
    """Device-seconds, precompute included, until the first stop at which an arm is as good as live was at its first."""
    rows = []
    for name in (LIVE_A, PAPER_A, IMPORTANCE_A):
        seconds = []
        for run in runs:
            target = run.arms[LIVE_A][0]["accuracy"]
            reached = next((found for found in run.arms[name] if found["accuracy"] >= target), None)
            if reached is not None:
                seconds.append(_seconds(run, reached))
        told = f"{sum(seconds) / len(seconds):.0f} s in {len(seconds)} of {len(runs)} seeds" if seconds else "never"
        rows.append(Row(f"to equal accuracy: {name}", {"equal": told}))
    return rows


def _seconds(run: Runs, found: Mapping[str, Any]) -> float:
    """Device-seconds that an arm had taken when it came to a stop."""
    if "parts" in found:
        return sum(found["parts"][part] for part in PARTS)
    return run.rollouts["working_s"] + run.scores["working_s"] + found["step_seconds"] * found["step"]


def _per_token(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: parts[name] / parts["tokens"] for name in PARTS}


def _lightning(run: Runs, trained: float) -> dict[str, float]:
    """Seconds per trained token when so many tokens are trained on one precompute."""
    last = run.arms[PAPER_A][-1]
    return {
        "weights": 0.0,
        "rollouts": run.rollouts["working_s"] / trained,
        "scoring": run.scores["working_s"] / trained,
        "training": last["step_seconds"] * last["step"] / last["trained"],
    }


def _cost_row(name: str, costs: Sequence[Mapping[str, float]], ratio: Mean | None = None) -> Row:
    figures = {part: Mean.of([1e3 * cost[part] for cost in costs]) for part in PARTS}
    total = {"total": Mean.of([1e3 * sum(cost.values()) for cost in costs])}
    return Row(name, {**figures, **total, **({"ratio": ratio} if ratio else {})})
