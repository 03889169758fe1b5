"""Claim (e): device-seconds of a trained token, live and with Lightning, all of its precompute counted.

Timed in runs of its own, one after the other, on a machine that should have nothing else to do: one part at a time has
all of it, in live distillation too, so that seconds are device-seconds. Whatever a command takes to start is measured
with next to no rows, and taken off.
"""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.study.arms import PAPER, SHORT
from benchmarks.study.distil import alive, offline
from benchmarks.study.lab import TIMED, Lab
from benchmarks.study.results.findings import Finding, Row, Verdict
from benchmarks.study.results.statistics import Mean
from benchmarks.study.runs import IMPORTANCE_A, LIVE_A, PAPER_A, Runs
from common.dataset import open_dataset
from common.errors import DataError

PARTS = ("weights", "rollouts", "scoring", "training")
GOAL = 4.0
"""Of live / Lightning, from the paper's 120 and 30 GPU-hours."""
FEW = 16
"""Rollouts of a precompute that is all start."""
IDLE = 20.0
"""Percent of the machine that others may use while seconds count."""

Timing = Mapping[str, Any]
"""Seconds a trained token of each part, `live`, and of `lightning` where every rollout is trained on once; tokens of a
precompute and of a step; seconds that both phases take to start."""


def timing(lab: Lab, number: int) -> Timing:
    """One measurement; others are numbered otherwise."""
    start, rows, name = lab.student(0), lab.extent.rollouts, f"{TIMED}{number}"
    lab.skill("a", 0)  # its teacher is made, and everything imported
    machine = {"cores": os.cpu_count(), "processor": platform.machine()}

    def make() -> dict[str, Any]:
        busy = psutil.cpu_percent(interval=2)
        if busy > IDLE:
            raise DataError(f"others use {busy:.0f}% of this machine", where=name, fix="Leave it alone, and run again")
        few, _ = _precompute(lab, f"{name}/few", FEW)
        whole, data = _precompute(lab, f"{name}/all", rows)
        tokens = int(open_dataset(str(data)).row_lengths().completion.sum())
        [offline_run] = offline(lab, name, start, data, "a", PAPER, [SHORT], 0)
        [live_run] = alive(lab, name, start, "a", PAPER, [SHORT], 0)
        phases = {phase: (whole[phase] - few[phase]) / tokens for phase in ("rollouts", "scoring")}
        parts = live_run["parts"]
        return {
            "busy_percent": busy,
            "live": {part: parts[part] / parts["tokens"] for part in PARTS},
            "lightning": {"weights": 0.0, **phases, "training": offline_run["training_s"] / offline_run["trained"]},
            "tokens": tokens,
            "step_tokens": offline_run["trained"] / SHORT,
            "start_s": sum(few.values()),
        }

    return lab.cells.get(name, {"machine": machine, "rows": rows, "number": number}, make)


def _precompute(lab: Lab, name: str, rows: int) -> tuple[dict[str, float], Path]:
    """Wall seconds of both phases, and what they made."""
    rollouts = lab.rollouts(name, lab.student(0), 0, rows)
    scored = lab.scored(name, rollouts, "a")
    return {"rollouts": lab.seconds(rollouts), "scoring": lab.seconds(scored)}, scored


def cost(timings: Sequence[Timing], runs: Sequence[Runs], stops: Sequence[int], epochs: float) -> Finding:
    """Args:
    timings: two at least; their spread is what the intervals show.
    runs: whose accuracy says when an arm is as good as live distillation.
    epochs: how often the arms have gone over their rollouts at the last stop.
    """
    live = [timed["live"] for timed in timings]
    ways = {f"Lightning, {e:.4g} epochs": [_after(timed["lightning"], e) for timed in timings] for e in (1.0, epochs)}
    ratios = {
        name: Mean.of([sum(a.values()) / sum(b.values()) for a, b in zip(live, costs, strict=True)])
        for name, costs in ways.items()
    }
    once, often = ratios.values()
    starts = Mean.of([timed["start_s"] for timed in timings])
    verdict: Verdict = "holds" if once.low >= GOAL else "does not hold" if once.high < GOAL else "not shown"
    return Finding(
        key="e",
        title=f"Live OPD takes {GOAL} times the device-seconds of Lightning",
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
        rows=[
            _row("live", live),
            *(_row(name, costs, ratios[name]) for name, costs in ways.items()),
            *_to_equal_accuracy(timings, runs),
        ],
        verdict=verdict,
        answer=f"Live takes {once} times the device-seconds of Lightning where each rollout is trained on once, and "
        f"{often} times at {epochs:.4g} epochs over one dataset. The claim is judged at one epoch. {_needed(timings)} "
        f"± is over {len(timings)} repetitions. "
        "Every further run on the same dataset pays for none of its precompute. The start of the engines is left out "
        f"on both sides; that of precompute takes {starts} s. One part at a time has the machine here: what live "
        "distillation loses on a cluster, where a teacher's GPUs wait for the student and the student's for the "
        "teacher, is not in these figures.",
        seeds=(0,),
        timing=True,
    )


def _after(once: Mapping[str, float], epochs: float) -> dict[str, float]:
    """Seconds of a trained token when every rollout is trained on so often."""
    return {part: seconds if part == "training" else seconds / epochs for part, seconds in once.items()}


def _needed(timings: Sequence[Timing]) -> str:
    """From how many epochs on the goal is reached."""
    live, training, once = (
        sum(figures) / len(timings)
        for figures in zip(
            *(
                (sum(one["live"].values()), one["lightning"]["training"], sum(one["lightning"].values()))
                for one in timings
            ),
            strict=True,
        )
    )
    left = live / GOAL - training
    if left <= 0:
        return f"No number of epochs reaches {GOAL}: training alone is more than a {GOAL:g}th of live."
    return f"It reaches {GOAL} from {(once - training) / left:.1f} epochs on."


def _to_equal_accuracy(timings: Sequence[Timing], runs: Sequence[Runs]) -> list[Row]:
    """Device-seconds, precompute included, to the first stop at which an arm is as good as live at its first.

    Of the arms whose scores are the sampled tokens' alone, as those are that were timed.
    """
    seconds = {key: sum(one[key] for one in timings) / len(timings) for key in ("tokens", "step_tokens")}
    live, once = (
        {part: sum(one[way][part] for one in timings) / len(timings) for part in PARTS} for way in ("live", "lightning")
    )
    precompute = (once["rollouts"] + once["scoring"]) * seconds["tokens"]
    target, rows = _accuracy(runs, LIVE_A, 0), []
    for name in (LIVE_A, PAPER_A, IMPORTANCE_A):
        found = enumerate(runs[0].arms[name])
        reached = next((one["step"] for index, one in found if _accuracy(runs, name, index) >= target), None)
        if reached is None:
            told = f"not in {runs[0].arms[name][-1]['step']} steps"
        elif name == LIVE_A:
            told = f"{sum(live.values()) * seconds['step_tokens'] * reached:.0f} s"
        else:
            told = f"{precompute + once['training'] * seconds['step_tokens'] * reached:.0f} s"
        rows.append(Row(f"to equal accuracy: {name}", {"equal": told}))
    return rows


def _accuracy(runs: Sequence[Runs], name: str, index: int) -> float:
    """Mean over the seeds at a stop."""
    return sum(run.arms[name][index]["accuracy"] for run in runs) / len(runs)


def _row(name: str, costs: Sequence[Mapping[str, float]], ratio: Mean | None = None) -> Row:
    figures = {part: Mean.of([1e3 * cost[part] for cost in costs]) for part in PARTS}
    total = {"total": Mean.of([1e3 * sum(cost.values()) for cost in costs])}
    return Row(name, {**figures, **total, **({"ratio": ratio} if ratio else {})})
