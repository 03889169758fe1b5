"""The same work in one round or several, each with rollouts of the student of the last."""

from collections.abc import Sequence

from benchmarks.study.arms import IMPORTANCE, OTHER_RATES, ROUNDS, ROUNDS_ROLLOUTS, ROUNDS_ROWS, WARM_UP, Arm
from benchmarks.study.beyond.rows import COLUMNS, against_first, row
from benchmarks.study.distil import Result, offline
from benchmarks.study.lab import Lab
from benchmarks.study.results.findings import Finding


def rounds(lab: Lab, seeds: Sequence[int]) -> Finding:
    """As many rollouts, rows and steps in all, in one round or several, each from the student of the last."""
    steps = lab.extent.stops[0]
    gentle = OTHER_RATES[0]
    ways = {
        "": IMPORTANCE,
        ", warm-up": IMPORTANCE.warmed_up(),
        f", lr = {gentle:g}": IMPORTANCE.at_rate(gentle),
    }
    names = {count: f"{count} round{'s' if count > 1 else ''}" for count in ROUNDS}
    found = [
        {f"{name}{way}": [_refreshed(lab, seed, count, steps, arm) for seed in seeds] for count, name in names.items()}
        for way, arm in ways.items()
    ]
    return Finding(
        key="rounds",
        title="Refreshed rollouts",
        question=f"Do fresh rollouts help when {ROUNDS_ROLLOUTS:,} rollouts and {steps} steps of {ROUNDS_ROWS} rows "
        "are shared among several rounds? The loss is `importance`. Each round starts AdamW anew; with warm-up its "
        f"rate rises over the first {WARM_UP:.0%} of its steps.",
        columns={**COLUMNS, "worst": "accuracy after its worst round"},
        rows=[row(lab, seeds, name, each) for by_count in found for name, each in by_count.items()],
        verdict="measured",
        answer=" ".join(map(against_first, found)),
        seeds=seeds,
    )


def _refreshed(lab: Lab, seed: int, count: int, steps: int, arm: Arm) -> Result:
    """The last of so many rounds; only that is measured against the SFT model."""
    student = first = lab.student(seed)
    rows, result, worst = ROUNDS_ROLLOUTS // count, Result(), 1.0
    for number in range(count):
        name = f"seed-{seed}/rounds-{count}-{number}"
        rolled = lab.rollouts(name, student, seed, rows, first=2 * number * rows)
        data = lab.scored(name, rolled, "a")
        more = {"since": first, "rows_per_step": ROUNDS_ROWS}
        [result] = offline(lab, name, student, data, "a", arm, [steps // count], seed, **more)
        student, worst = lab.root / result["export"], min(worst, result["accuracy"])
    return {**result, "worst": worst}
