"""Beyond the paper: objectives, refreshed rollouts, staleness, truncation, temperature, and controls."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.arms import (
    FULL_SUPPORT,
    IMPORTANCE,
    OBJECTIVES,
    PAPER,
    ROUNDS,
    ROUNDS_ROLLOUTS,
    ROUNDS_ROWS,
    TEMPERATURES,
    TRUNCATIONS,
    WARM_UP,
    Arm,
)
from benchmarks.study.distil import CONTROLS, Result, alive, before, control, offline
from benchmarks.study.lab import Lab
from benchmarks.study.results.findings import Curve, Finding, Plot, Row
from benchmarks.study.results.statistics import Mean, difference
from benchmarks.study.runs import distilled, graded
from trainer.config import OpdConfig
from trainer.watch.advice import limits_of, signs

COLUMNS = {
    "accuracy": "accuracy",
    "gain": "gain on SFT",
    "reverse_kl": "KL(student to teacher), nats/token",
    "drift": "KL(student to SFT model), nats/token",
}
GAUGES = {"ess": "ratio/ess", "rollout_k3": "kl/rollout_k3"}
"""The trainer's metrics that are to tell when rollouts are spent."""
Found = dict[str, list[Result]]
"""Results of an arm by seed, in their order."""


def beyond(lab: Lab, seeds: Sequence[int]) -> list[Finding]:
    """All of them."""
    return [make(lab, seeds) for make in (objectives, warm_up, staleness, rounds, truncation, temperature)]


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
        paper.append(alive(lab, f"seed-{seed}/a", start, "a", PAPER, lab.extent.stops, seed)[0])
        full += alive(lab, f"seed-{seed}/a", start, "a", FULL_SUPPORT, [step], seed, topk=lab.vocabulary)
    rows = [_row(lab, seeds, name, each) for name, each in found.items()]
    besides = {**controls, "live, paper": paper, "live, topk reverse, k = all": full}
    gains = {name: _gain(lab, seeds, each) for name, each in found.items()}
    best = max(gains, key=lambda name: gains[name].mean)
    right = {name: [one["accuracy"] for one in each] for name, each in {**found, **besides}.items()}
    return Finding(
        key="objectives",
        title="Objectives side by side",
        question=f"Which objective makes most of the same {lab.extent.rollouts:,} scored rollouts in {step} steps?",
        columns=COLUMNS,
        rows=[_sft(lab, seeds), *rows, *(_row(lab, seeds, name, each) for name, each in besides.items())],
        verdict="measured",
        answer=f"Most accurate offline: {best}, {gains[best]} above SFT. Accuracy less its, seed by seed: "
        + "; ".join(f"{name}: {difference(values, right[best])}" for name, values in right.items() if name != best)
        + ".",
        seeds=seeds,
    )


def warm_up(lab: Lab, seeds: Sequence[int]) -> Finding:
    """Objectives with a learning rate that rises at first, and without."""
    step = lab.extent.stops[0]
    rows, told = [], []
    for arm in (PAPER, IMPORTANCE, FULL_SUPPORT):
        both = (arm, arm.warmed_up())
        at_once, rising = ([distilled(lab, seed, "a", one, [step])[0] for seed in seeds] for one in both)
        rows += [_row(lab, seeds, one.name, each) for one, each in zip(both, (at_once, rising), strict=True)]
        told.append(f"{arm.name} {_against(rising, at_once)}")
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


def staleness(lab: Lab, seeds: Sequence[int]) -> Finding:
    """One dataset, far longer than is wise; what the trainer's own gauges said meanwhile."""
    stops = [*lab.extent.stops, 2 * lab.extent.stops[-1]]
    rows, curves, told = [], [], []
    for arm in (PAPER, IMPORTANCE, FULL_SUPPORT):
        by_seed = [distilled(lab, seed, "a", arm, stops) for seed in seeds]
        for index, stop in enumerate(stops):
            each = [runs[index] for runs in by_seed]
            gauges = {key: Mean.of([run["metrics"][metric][-1] for run in each]) for key, metric in GAUGES.items()}
            rows.append(Row(f"{arm.name}, {stop} steps", {**_row(lab, seeds, "", each).figures, **gauges}))
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
    told = ", ".join(_spent_at(runs[-1]["metrics"]) for runs in by_seed)
    return (
        f"{name}: most accurate after {stops[best]} steps ({means[best]}), {means[-1]} after {stops[-1]}; the trainer, "
        f"by seed, called the rollouts spent at step {told}"
    )


def _spent_at(metrics: Mapping[str, Sequence[float]]) -> str:
    """The first step at which the trainer's own limits are passed."""
    records = [dict(zip(metrics, step, strict=True)) for step in zip(*metrics.values(), strict=True)]
    limits = limits_of(OpdConfig(model="-", data="-", output="-"))
    steps = range(1, len(records) + 1)
    return next((str(step) for step in steps if signs(records[:step], limits)), "never")


def rounds(lab: Lab, seeds: Sequence[int]) -> Finding:
    """As many rollouts, rows and steps in all, in one round or several, each from the student of the last."""
    steps = lab.extent.stops[0]
    both = (IMPORTANCE, IMPORTANCE.warmed_up())
    at_once, rising = (
        {
            f"{count} round{'s' if count > 1 else ''}": [_refreshed(lab, seed, count, steps, arm) for seed in seeds]
            for count in ROUNDS
        }
        for arm in both
    )
    warmed_up = "; ".join(f"{name} {_against(rising[name], each)}" for name, each in at_once.items())
    return Finding(
        key="rounds",
        title="Refreshed rollouts",
        question=f"Do fresh rollouts help when {ROUNDS_ROLLOUTS:,} rollouts and {steps} steps of {ROUNDS_ROWS} rows "
        "are shared among several rounds? The loss is `importance`.",
        columns={**COLUMNS, "worst": "accuracy after its worst round"},
        rows=[
            _row(lab, seeds, f"{name}{suffix}", found[name])
            for name in at_once
            for suffix, found in (("", at_once), (", warm-up", rising))
        ],
        verdict="measured",
        answer=f"{_against_first(at_once)} Each round starts AdamW anew; with warm-up its rate rises over the first "
        f"{WARM_UP:.0%} of its steps, with which accuracy is, less that without: {warmed_up}.",
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


def truncation(lab: Lab, seeds: Sequence[int]) -> Finding:
    """Rollouts cut off early, as many of them."""
    return _sampled_otherwise(
        lab,
        seeds,
        "truncation",
        "Truncated rollouts",
        "Does it do to sample only the beginning of each answer? The loss is `importance`.",
        {f"first {tokens} tokens": {"max_tokens": tokens} for tokens in TRUNCATIONS},
    )


def temperature(lab: Lab, seeds: Sequence[int]) -> Finding:
    """Rollouts that are not quite the student's own."""
    return _sampled_otherwise(
        lab,
        seeds,
        "temperature",
        "Rollouts at other temperatures",
        "What do rollouts cost that were not sampled at temperature 1? The loss is `importance`.",
        {f"T = {value}": {"temperature": value} for value in TEMPERATURES},
    )


def _sampled_otherwise(
    lab: Lab, seeds: Sequence[int], key: str, title: str, question: str, ways: Mapping[str, Mapping[str, Any]]
) -> Finding:
    step = lab.extent.stops[0]
    found: Found = {"whole, at temperature 1": [], **{name: [] for name in ways}}
    for seed in seeds:
        start = lab.student(seed)
        whole, *others = found.values()
        whole += distilled(lab, seed, "a", IMPORTANCE, [step])
        for results, sampling in zip(others, ways.values(), strict=True):
            name = f"seed-{seed}/{'-'.join(f'{what}-{value}' for what, value in sampling.items())}"
            rolled = lab.rollouts(name, start, seed, lab.extent.rollouts, **sampling)
            results += offline(lab, name, start, lab.scored(name, rolled, "a"), "a", IMPORTANCE, [step], seed)
    return Finding(
        key=key,
        title=title,
        question=question,
        columns={**COLUMNS, "trained": "tokens trained on"},
        rows=[_row(lab, seeds, name, each) for name, each in found.items()],
        verdict="measured",
        answer=_against_first(found),
        seeds=seeds,
    )


def _against_first(found: Found) -> str:
    first, *others = found
    gaps = [f"{name} {_against(found[name], found[first])}" for name in others]
    return f"Accuracy less that of {first}, seed by seed: {'; '.join(gaps)}."


def _against(found: Sequence[Result], others: Sequence[Result]) -> Mean:
    """Accuracy of these less that of others, of the same seeds."""
    return difference([one["accuracy"] for one in found], [one["accuracy"] for one in others])


def _sft(lab: Lab, seeds: Sequence[int]) -> Row:
    found = [before(lab, seed) for seed in seeds]
    return Row("after SFT", {key: Mean.of([one[key] for one in found]) for key in COLUMNS if key != "gain"})


def _row(lab: Lab, seeds: Sequence[int], name: str, found: Sequence[Result]) -> Row:
    figures: dict[str, Mean | float | str] = {
        key: Mean.of([one[key] for one in found])
        for key in ("accuracy", "reverse_kl", "drift", "trained", "worst")
        if key in found[0]
    }
    return Row(name, {**figures, "gain": _gain(lab, seeds, found)})


def _gain(lab: Lab, seeds: Sequence[int], found: Sequence[Result]) -> Mean:
    sft = [before(lab, seed)["accuracy"] for seed in seeds]
    return difference([one["accuracy"] for one in found], sft)
