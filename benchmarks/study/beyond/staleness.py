"""How long one dataset serves, and whether the trainer's own gauges tell."""

from collections.abc import Mapping, Sequence

from benchmarks.study.arms import FULL_SUPPORT, IMPORTANCE, PAPER
from benchmarks.study.beyond.rows import COLUMNS, against, row
from benchmarks.study.distil import Result
from benchmarks.study.lab import Lab
from benchmarks.study.results.findings import Curve, Finding, Plot, Row
from benchmarks.study.results.statistics import Mean
from benchmarks.study.runs import distilled
from trainer.config import OpdConfig
from trainer.watch.advice import limits_of, signs

GAUGES = {"ess": "ratio/ess", "rollout_k3": "kl/rollout_k3"}
"""The trainer's metrics that are to tell when rollouts are spent."""


def staleness(lab: Lab, seeds: Sequence[int]) -> Finding:
    """One dataset, far longer than is wise; what the trainer's own gauges said meanwhile."""
    stops = [*lab.extent.stops, 2 * lab.extent.stops[-1]]
    rows, curves, told = [], [], []
    for arm in (PAPER, IMPORTANCE, FULL_SUPPORT):
        by_seed = [distilled(lab, seed, "a", arm, stops) for seed in seeds]
        for index, stop in enumerate(stops):
            each = [runs[index] for runs in by_seed]
            gauges = {key: Mean.of([run["metrics"][metric][-1] for run in each]) for key, metric in GAUGES.items()}
            rows.append(Row(f"{arm.name}, {stop} steps", {**row(lab, seeds, "", each).figures, **gauges}))
        means = [Mean.of([runs[index]["accuracy"] for runs in by_seed]) for index in range(len(stops))]
        curves.append(Curve(arm.name, list(zip(stops, means, strict=True))))
        told.append(_foretold(arm.name, by_seed, stops, means))
    return Finding(
        key="staleness",
        title="How long one dataset serves",
        question="After how many steps on one dataset does the student stop gaining, and do ESS and drift foretell it?",
        columns={**COLUMNS, "ess": "ESS", "rollout_k3": "k3 to the rollout policy, nats"},
        rows=rows,
        verdict="measured",
        answer="; ".join(told) + ".",
        seeds=seeds,
        plots=[Plot("Accuracy on one dataset", "optimizer steps", "accuracy", curves)],
    )


def _foretold(name: str, by_seed: Sequence[Sequence[Result]], stops: Sequence[int], means: Sequence[Mean]) -> str:
    best = max(range(len(stops)), key=lambda index: means[index].mean)
    first, last = ([runs[index] for runs in by_seed] for index in (0, -1))
    told = ", ".join(spent_at(run["metrics"]) for run in last)
    return (
        f"{name}: most accurate after {stops[best]} steps ({means[best]}); after {stops[-1]} less after {stops[0]}: "
        f"accuracy {against(last, first)}, KL to the teacher {against(last, first, 'reverse_kl')}; the trainer, by "
        f"seed, called the rollouts spent at step {told}"
    )


def spent_at(metrics: Mapping[str, Sequence[float]]) -> str:
    """The first step at which the trainer's own limits are passed."""
    records = [dict(zip(metrics, step, strict=True)) for step in zip(*metrics.values(), strict=True)]
    limits = limits_of(OpdConfig(model="-", data="-", output="-"))
    steps = range(1, len(records) + 1)
    return next((str(step) for step in steps if signs(records[:step], limits)), "never")
