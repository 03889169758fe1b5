"""Every objective on the same scored rollouts, with controls and live students."""

from collections.abc import Sequence

from benchmarks.study.arms import FULL_SUPPORT, OBJECTIVES, PAPER
from benchmarks.study.beyond.rows import COLUMNS, LIVE, Found, gain, row, sft_row
from benchmarks.study.distil import CONTROLS, PUSH_NATS, Result, control
from benchmarks.study.lab import Lab
from benchmarks.study.results.findings import Finding
from benchmarks.study.results.statistics import difference
from benchmarks.study.runs import distilled, distilled_live, graded


def objectives(lab: Lab, seeds: Sequence[int]) -> Finding:
    """Every objective on the same scored rollouts, two controls, two live students."""
    step = lab.extent.stops[0]
    found: Found = {arm.name: [] for arm in OBJECTIVES}
    controls: Found = {name: [] for name in CONTROLS}
    paper, full = list[Result](), list[Result]()
    for seed in seeds:
        for arm in OBJECTIVES:
            found[arm.name] += distilled(lab, seed, "a", arm, [step])
        start = lab.student(seed)
        for name, results in controls.items():
            results.append(control(lab, name, start, graded(lab, seed, "a"), step, seed))
        paper.append(distilled_live(lab, seed, "a", PAPER, lab.extent.stops)[0])
        full += distilled_live(lab, seed, "a", FULL_SUPPORT, [step], topk=lab.vocabulary)
    rows = [row(lab, seeds, name, each) for name, each in found.items()]
    besides = {**controls, LIVE: paper, f"live, {FULL_SUPPORT.name}": full}
    gains = {name: gain(lab, seeds, each) for name, each in found.items()}
    best = max(gains, key=lambda name: gains[name].mean)
    right = {name: [one["accuracy"] for one in each] for name, each in {**found, **besides}.items()}
    return Finding(
        key="objectives",
        title="Objectives side by side",
        question=f"Which objective makes most of the same {lab.extent.rollouts:,} scored rollouts in {step} steps? Two "
        f"controls show what the loss does without a teacher: `importance` with an advantage of -{PUSH_NATS} nats for "
        "every token, and with the teacher's advantages dealt out at random.",
        columns=COLUMNS,
        rows=[sft_row(lab, seeds), *rows, *(row(lab, seeds, name, each) for name, each in besides.items())],
        verdict="measured",
        answer=f"Most accurate offline: {best}, {gains[best]} above SFT. Accuracy of the others less that of "
        f"{best}, seed by seed: "
        + "; ".join(f"{name}: {difference(values, right[best])}" for name, values in right.items() if name != best)
        + ".",
        seeds=seeds,
    )
