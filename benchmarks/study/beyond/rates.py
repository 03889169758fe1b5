"""Whether another learning rate, or one that rises at first, changes who is ahead."""

from collections.abc import Sequence

from benchmarks.study.arms import FULL_SUPPORT, IMPORTANCE, OTHER_RATES, PAPER, WARM_UP
from benchmarks.study.beyond.rows import COLUMNS, LIVE, against, row
from benchmarks.study.distil import Result
from benchmarks.study.lab import Lab
from benchmarks.study.results.findings import Finding
from benchmarks.study.runs import distilled, distilled_live


def learning_rate(lab: Lab, seeds: Sequence[int]) -> Finding:
    """Lightning and live distillation at other learning rates, each beside the other at the same one."""
    stops = lab.extent.stops
    rows, accuracies, drifts = [], [], []
    for lr in sorted((lab.extent.lr, *OTHER_RATES)):
        found = _at(lab, seeds, lr)
        for index in (0, len(stops) - 1):
            here = f"lr = {lr:g}, {stops[index]} steps"
            each = {name: [runs[index] for runs in by_seed] for name, by_seed in found.items()}
            rows += [row(lab, seeds, f"{name}, {here}", results) for name, results in each.items()]
            live = each.pop(LIVE)
            less = ", ".join(f"{name} {against(results, live)}" for name, results in each.items())
            accuracies.append(f"{here}: {less}")
            drifts.append(f"{here}: {against(each[PAPER.name], live, 'drift')}")
    return Finding(
        key="rate",
        title="Learning rate",
        question="Is it the learning rate, the same for all, that puts one way to distil behind another?",
        columns=COLUMNS,
        rows=rows,
        verdict="measured",
        answer="Accuracy less that of live distillation with the paper's loss, at the same rate and steps, seed by "
        f"seed: {'; '.join(accuracies)}. Drift of `paper` less that of live distillation, in nats: "
        f"{'; '.join(drifts)}.",
        seeds=seeds,
    )


def _at(lab: Lab, seeds: Sequence[int], lr: float) -> dict[str, list[list[Result]]]:
    """Results of each way to distil, by seed and stop."""
    usual, stops = lr == lab.extent.lr, lab.extent.stops
    live = PAPER if usual else PAPER.at_rate(lr)
    found = {LIVE: [distilled_live(lab, seed, "a", live, stops) for seed in seeds]}
    for arm in (PAPER, IMPORTANCE, FULL_SUPPORT):
        same = arm if usual else arm.at_rate(lr)
        found[arm.name] = [distilled(lab, seed, "a", same, stops) for seed in seeds]
    return found


def warm_up(lab: Lab, seeds: Sequence[int]) -> Finding:
    """Objectives with a learning rate that rises at first, and without."""
    step = lab.extent.stops[0]
    rows, told = [], []
    for arm in (PAPER, IMPORTANCE, FULL_SUPPORT):
        both = (arm, arm.warmed_up())
        at_once, rising = ([distilled(lab, seed, "a", one, [step])[0] for seed in seeds] for one in both)
        rows += [row(lab, seeds, one.name, each) for one, each in zip(both, (at_once, rising), strict=True)]
        told.append(f"{arm.name} {against(rising, at_once)}")
    return Finding(
        key="warm-up",
        title="Warm-up",
        question="Does it help that the learning rate rises at first? AdamW begins anew with every run.",
        columns=COLUMNS,
        rows=rows,
        verdict="measured",
        answer=f"Accuracy with a rate that rises over the first {WARM_UP:.0%} of {step} steps less that without, seed "
        f"by seed: {'; '.join(told)}.",
        seeds=seeds,
    )
