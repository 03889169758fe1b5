"""Claim (e): device-seconds of a trained token, live and with Lightning, all of its precompute counted.

Timed in runs of its own, one after the other, on a machine that should have nothing else to do: one part at a time has
all of it, in live distillation too, so that seconds are device-seconds. Whatever a command takes to start is measured
with next to no rows, and taken off.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from benchmarks.machine import processor
from benchmarks.study.arms import FULL_SUPPORT, PAPER, SHORT, Arm, Extent
from benchmarks.study.cells import named
from benchmarks.study.distil import alive, offline, text_of_live
from benchmarks.study.lab import RECIPE, TIMED, Lab, weights
from benchmarks.study.results.findings import Finding, Row, Verdict
from benchmarks.study.results.statistics import Mean
from benchmarks.study.runs import FULL_A, IMPORTANCE_A, LIVE_A, PAPER_A, Runs
from common.dataset import open_dataset
from common.errors import DataError

PARTS = ("weights", "rollouts", "scoring", "training")
GOAL = 4.0
"""Of live / Lightning, from the paper's 120 and 30 GPU-hours."""
PAPER_EPOCHS = 150 * 256 / 17_000
"""Of the paper's larger run: steps and rows of its recipe, over one rollout to each of its prompts."""
FEW = 16
"""Rollouts of a precompute that is all start."""
IDLE = 20.0
"""Percent of the machine that others may use while seconds count."""
SAMPLED, WHOLE = "Lightning as in the paper", "Lightning, full support"
WAYS: Mapping[str, Arm] = {SAMPLED: PAPER, WHOLE: FULL_SUPPORT}
"""What is timed beside live distillation: scores of the sampled tokens alone, and of the whole vocabulary."""

Parts = Mapping[str, float]
"""Seconds a trained token of each of PARTS."""
Timing = Mapping[str, Any]
"""One measurement: `live`, Parts; `lightning`, those of WAYS where every rollout is trained on once; tokens of a
rollout; seconds that the two phases of precompute take to start."""


def timing(lab: Lab, number: int) -> Timing:
    """One measurement; others are numbered otherwise."""
    start, rows = lab.student(0), SHORT * lab.extent.rows_per_step
    lab.skill("a", 0)  # its teacher is made, and everything imported
    inputs = {
        "machine": processor(),
        "number": number,
        "rows": rows,
        "student": weights(start),
        "teacher": weights(lab.teacher("a")),
        "recipe": RECIPE.read_text(),
        "ways": [lab.settings("opd", 0, arm.settings) for arm in WAYS.values()],
        "live": text_of_live(),
    }
    name = named(f"{TIMED}{number}", inputs)  # no part is taken from another measurement

    def make() -> dict[str, Any]:
        busy = psutil.cpu_percent(interval=2)
        if busy > IDLE:
            raise DataError(f"others use {busy:.0f}% of this machine", where=name, fix="Leave it alone, and run again")
        few, many = (lab.rollouts(f"{name}/{count}", start, 0, count) for count in (FEW, rows))
        tokens = int(open_dataset(str(many)).row_lengths().completion.sum())
        lightning, starts = dict[str, Parts](), dict[str, float]()
        for way, arm in WAYS.items():
            topk = lab.vocabulary if arm is FULL_SUPPORT else 0
            none, data = (
                lab.scored(f"{name}/{count}/{arm.slug}", rollouts, "a", topk=topk)
                for count, rollouts in ((FEW, few), (rows, many))
            )
            [run] = offline(lab, name, start, data, "a", arm, [SHORT], 0)
            lightning[way] = {
                "weights": 0.0,
                "rollouts": (lab.seconds(many) - lab.seconds(few)) / tokens,
                "scoring": (lab.seconds(data) - lab.seconds(none)) / tokens,
                "training": run["training_s"] / run["trained"],
            }
            starts[way] = lab.seconds(few) + lab.seconds(none)
        [run] = alive(lab, name, start, "a", PAPER, [SHORT], 0)
        return {
            "busy_percent": busy,
            "live": {part: run["parts"][part] / run["parts"]["tokens"] for part in PARTS},
            "lightning": lightning,
            "row_tokens": tokens / rows,
            "start_s": starts[SAMPLED],
        }

    return lab.cells.get(name, inputs, make)


def cost(timings: Sequence[Timing], runs: Sequence[Runs], extent: Extent) -> Finding:
    """Args:
    timings: two at least; their spread is what the intervals show.
    runs: whose accuracy says when an arm is as good as live distillation.
    """
    epochs = extent.stops[-1] * extent.rows_per_step / extent.rollouts
    live = [timed["live"] for timed in timings]
    costs = {
        (way, often): [_after(timed["lightning"][way], often) for timed in timings]
        for way in WAYS
        for often in (1, PAPER_EPOCHS, epochs)
    }
    ratios = {
        key: Mean.of([_total(a) / _total(b) for a, b in zip(live, each, strict=True)]) for key, each in costs.items()
    }
    paper = ratios[SAMPLED, PAPER_EPOCHS]
    starts = Mean.of([timed["start_s"] for timed in timings])
    slower = {
        part: Mean.of([timed["lightning"][WHOLE][part] / timed["lightning"][SAMPLED][part] for timed in timings])
        for part in ("scoring", "training")
    }
    verdict: Verdict = "holds" if paper.low >= GOAL else "does not hold" if paper.high < GOAL else "not shown"
    return Finding(
        key="e",
        title=f"Live OPD takes {GOAL} times the device-seconds of Lightning",
        question="How much machine time does a trained token cost, all of Lightning's own precompute counted? The "
        f"paper tells of 120 and 30 GPU-hours, for {PAPER_EPOCHS:.1f} epochs over its rollouts.",
        columns={
            "weights": "weights to the engine, ms/token",
            "rollouts": "rollouts, ms/token",
            "scoring": "scoring, ms/token",
            "training": "training, ms/token",
            "total": "all, ms/token",
            "equal": f"seconds to live's accuracy after {extent.stops[0]} steps",
            "ratio": "live / this",
        },
        rows=[
            _row(LIVE_A, live),
            *(
                _row(f"{way}, {often:.4g} epoch{'s' if often > 1 else ''}", each, ratios[way, often])
                for (way, often), each in costs.items()
            ),
            *_to_equal_accuracy(timings, runs, extent),
        ],
        verdict=verdict,
        answer=f"Live takes {paper} times the device-seconds of Lightning as in the paper at {PAPER_EPOCHS:.1f} epochs "
        f"over one dataset, {ratios[SAMPLED, 1]} times where each rollout is trained on once, "
        f"{ratios[SAMPLED, epochs]} times at {epochs:.4g} epochs. The claim is judged at the first of these. With the "
        f"teacher's whole distribution stored a token takes {slower['scoring']} times as long to score and "
        f"{slower['training']} times as long to train on: by so much equal steps of objectives are not equal time. "
        f"± is over {len(timings)} repetitions. Every further run on the same dataset pays for none of its precompute. "
        f"To equal accuracy all {extent.rollouts:,} rollouts of an arm are on its bill. The start of the engines is "
        f"left out on both sides; that of precompute takes {starts} s. One part at a time has the machine here: what "
        "live distillation loses on a cluster, where a teacher's GPUs wait for the student and the student's for the "
        "teacher, is not in these figures.",
        would_hold=_needed(timings),
        seeds=(0,),
        timing=True,
    )


def _after(once: Parts, epochs: float) -> Parts:
    """Seconds of a trained token when every rollout is trained on so often."""
    return {part: seconds if part == "training" else seconds / epochs for part, seconds in once.items()}


def _total(parts: Parts) -> float:
    """All seconds of a trained token."""
    return sum(parts.values())


def _needed(timings: Sequence[Timing]) -> str:
    """From how many epochs on the goal is reached with the paper's loss."""
    once = [timed["lightning"][SAMPLED] for timed in timings]
    live = sum(_total(timed["live"]) for timed in timings)
    training = sum(parts["training"] for parts in once)
    left = live / GOAL - training
    if left <= 0:
        return f"No number of epochs reaches {GOAL}: training alone is more than a {GOAL:g}th of live."
    return f"{GOAL} is reached from {(sum(map(_total, once)) - training) / left:.1f} epochs on."


def _to_equal_accuracy(timings: Sequence[Timing], runs: Sequence[Runs], extent: Extent) -> list[Row]:
    """Device-seconds, precompute included, to the first stop at which an arm is as good as live at its first."""
    target = _accuracy(runs, LIVE_A, 0)
    live = [_total(timed["live"]) * _tokens(timed, extent, extent.stops[0]) for timed in timings]
    rows = [Row(f"{LIVE_A}, {extent.stops[0]} steps", {"equal": Mean.of(live)})]
    for name, way in ((PAPER_A, SAMPLED), (IMPORTANCE_A, SAMPLED), (FULL_A, WHOLE)):
        stop = next((stop for index, stop in enumerate(extent.stops) if _accuracy(runs, name, index) >= target), None)
        if stop is None:
            rows.append(Row(name, {"equal": f"not in {extent.stops[-1]} steps"}))
        else:
            offline = [_seconds(timed, way, extent, stop) for timed in timings]
            ratio = Mean.of([a / b for a, b in zip(live, offline, strict=True)])
            rows.append(Row(f"{name}, {stop} steps", {"equal": Mean.of(offline), "ratio": ratio}))
    return rows


def _seconds(timed: Timing, way: str, extent: Extent, steps: int) -> float:
    """Of the precompute of all rollouts, and so many steps on them."""
    parts = timed["lightning"][way]
    precompute = (parts["rollouts"] + parts["scoring"]) * timed["row_tokens"] * extent.rollouts
    return precompute + parts["training"] * _tokens(timed, extent, steps)


def _tokens(timed: Timing, extent: Extent, steps: int) -> float:
    """Trained on in so many steps."""
    return timed["row_tokens"] * extent.rows_per_step * steps


def _accuracy(runs: Sequence[Runs], name: str, index: int) -> float:
    """Mean over the seeds at a stop."""
    return sum(run.arms[name][index]["accuracy"] for run in runs) / len(runs)


def _row(name: str, costs: Sequence[Parts], ratio: Mean | None = None) -> Row:
    figures = {part: Mean.of([1e3 * cost[part] for cost in costs]) for part in PARTS}
    total = {"total": Mean.of([1e3 * _total(cost) for cost in costs])}
    return Row(name, {**figures, **total, **({"ratio": ratio} if ratio else {})})
