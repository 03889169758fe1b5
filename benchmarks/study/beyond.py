"""Beyond the paper: objectives, refreshed rollouts, staleness, truncation, temperature, and a control."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.study.arms import (
    CONTROL,
    FULL_SUPPORT,
    IMPORTANCE,
    OBJECTIVES,
    PAPER,
    ROUNDS,
    TEMPERATURES,
    TRUNCATIONS,
)
from benchmarks.study.distil import Figures, alive, before, control, offline
from benchmarks.study.lab import Lab
from benchmarks.study.results.findings import Curve, Finding, Plot, Row
from benchmarks.study.results.statistics import Mean, difference
from benchmarks.study.runs import fully_scored, scored
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


def beyond(lab: Lab, seeds: Sequence[int]) -> list[Finding]:
    """All of them."""
    return [make(lab, seeds) for make in (objectives, rounds, staleness, truncation, temperature)]


def objectives(lab: Lab, seeds: Sequence[int]) -> Finding:
    """Every objective on the same scored rollouts, a control whose advantage knows no teacher, two live students."""
    step = lab.extent.stops[0]
    found: dict[str, list[Figures]] = {arm.name: [] for arm in (*OBJECTIVES, CONTROL)}
    live: dict[str, list[Figures]] = {"live, paper": [], "live, topk reverse, k = all": []}
    whole = {**FULL_SUPPORT, "topk": lab.vocabulary}
    for seed in seeds:
        start, data = lab.student(seed), fully_scored(lab, seed)
        for arm in OBJECTIVES:
            place = f"seed-{seed}/objectives/{arm.name.replace(' ', '-')}"
            found[arm.name] += offline(lab, place, start, data, "a", [step], seed, arm.settings)
        found[CONTROL.name].append(control(lab, f"seed-{seed}/objectives/control", start, data, step, seed))
        paper, full = live.values()
        paper.append(alive(lab, f"seed-{seed}/live-a", start, "a", lab.extent.stops, seed, PAPER)[0])
        full += alive(lab, f"seed-{seed}/objectives/live-full", start, "a", [step], seed, whole)
    rows = [_row(lab, seeds, name, each) for name, each in found.items()]
    best = max(rows, key=lambda row: row.figures["gain"].mean)  # type: ignore[union-attr]
    seconds = [one["step_seconds"] for each in found.values() for one in each if "step_seconds" in one]
    return Finding(
        key="objectives",
        title="Objectives side by side",
        question=f"Which objective makes most of the same {lab.extent.rollouts:,} scored rollouts in {step} steps?",
        columns={**COLUMNS, "step_seconds": "s/step"},
        rows=[_sft(lab, seeds), *rows, *(_row(lab, seeds, name, each) for name, each in live.items())],
        verdict="measured",
        answer=f"Most accurate: {best.name}, {best.figures['gain']} above SFT. "
        + "; ".join(f"{row.name} {row.figures['gain']}" for row in rows if row is not best)
        + f". Equal steps are about equal time: a step took {min(seconds):.2f} to {max(seconds):.2f} s.",
        seeds=seeds,
    )


def rounds(lab: Lab, seeds: Sequence[int]) -> Finding:
    """As many rollouts and steps in all, in one round or several, each from the student of the last."""
    total, steps = lab.extent.rollouts, lab.extent.stops[0]
    found: dict[str, list[Figures]] = {f"{count} rounds" if count > 1 else "1 round": [] for count in ROUNDS}
    for seed in seeds:
        for name, count in zip(found, ROUNDS, strict=True):
            student = first = lab.student(seed)
            for number in range(count):
                place, rows = f"seed-{seed}/rounds-{count}/{number}", total // count
                rolled = lab.rollouts(f"{place}/rollouts", student, seed, rows, first=number * rows)
                data = lab.scored(f"{place}/scored", rolled, "a")
                stop = steps // count
                [figures] = offline(lab, f"{place}/opd", student, data, "a", [stop], seed, IMPORTANCE, first)
                student = lab.root / f"{place}/opd/export"
            found[name].append(figures)
    return Finding(
        key="rounds",
        title="Refreshed rollouts",
        question=f"Do fresh rollouts help when {total:,} rollouts and {steps} steps are shared among several rounds?",
        columns=COLUMNS,
        rows=[_row(lab, seeds, name, each) for name, each in found.items()],
        verdict="measured",
        answer=_against_first(lab, found),
        seeds=seeds,
    )


def staleness(lab: Lab, seeds: Sequence[int]) -> Finding:
    """One dataset, far longer than is wise; what the trainer's own gauges said meanwhile."""
    stops = [*lab.extent.stops, 2 * lab.extent.stops[-1]]
    found: dict[str, list[list[Figures]]] = {}
    for name, place, data, settings in (
        ("as in the paper", "paper-a", partial(scored, teacher="a"), PAPER),
        ("importance", "importance-a", partial(scored, teacher="a"), IMPORTANCE),
        ("full support", "full-a", fully_scored, FULL_SUPPORT),
    ):
        found[name] = [
            offline(lab, f"seed-{seed}/{place}", lab.student(seed), data(lab, seed), "a", stops, seed, settings)
            for seed in seeds
        ]
    rows, curves = [], []
    for name, by_seed in found.items():
        for index, stop in enumerate(stops):
            each = [runs[index] for runs in by_seed]
            gauges = {key: Mean.of([_last(run, metric) for run in each]) for key, metric in GAUGES.items()}
            rows.append(Row(f"{name}, {stop} steps", {**_row(lab, seeds, "", each).figures, **gauges}))
        points = [(stop, Mean.of([runs[index]["accuracy"] for runs in by_seed])) for index, stop in enumerate(stops)]
        curves.append(Curve(name, points))
    return Finding(
        key="staleness",
        title="How long one dataset serves",
        question="After how many steps on one dataset does the student stop gaining, and do ESS and drift foretell it?",
        columns={**COLUMNS, "ess": "ESS", "rollout_k3": "k3 to the rollout policy, nats"},
        rows=rows,
        verdict="measured",
        answer="; ".join(_foretold(name, by_seed, stops) for name, by_seed in found.items()),
        seeds=seeds,
        plots=[Plot("Accuracy on one dataset", "optimizer steps", "accuracy", curves)],
    )


def truncation(lab: Lab, seeds: Sequence[int]) -> Finding:
    """Rollouts cut off early, as many of them."""
    return _sampled_otherwise(
        lab,
        seeds,
        "truncation",
        "Truncated rollouts",
        "Does it do to sample only the beginning of each answer?",
        {f"first {tokens} tokens": {"max_tokens": tokens} for tokens in TRUNCATIONS},
    )


def temperature(lab: Lab, seeds: Sequence[int]) -> Finding:
    """Rollouts that are not quite the student's own."""
    return _sampled_otherwise(
        lab,
        seeds,
        "temperature",
        "Rollouts at other temperatures",
        "What do rollouts cost that were not sampled at temperature 1?",
        {f"T = {value}": {"temperature": value} for value in TEMPERATURES},
    )


def _sampled_otherwise(
    lab: Lab, seeds: Sequence[int], key: str, title: str, question: str, ways: Mapping[str, Mapping[str, Any]]
) -> Finding:
    step = lab.extent.stops[0]
    found: dict[str, list[Figures]] = {"whole, at temperature 1": []} | {name: [] for name in ways}
    for seed in seeds:
        start = lab.student(seed)
        for name in found:
            place = f"seed-{seed}/{key}/{name.replace(' ', '')}"
            if name in ways:
                rolled = lab.rollouts(f"{place}/rollouts", start, seed, lab.extent.rollouts, **ways[name])
                data = lab.scored(f"{place}/scored", rolled, "a")
            else:
                data = scored(lab, seed, "a")
            found[name] += offline(lab, f"{place}/opd", start, data, "a", [step], seed, IMPORTANCE)
    return Finding(
        key=key,
        title=title,
        question=question,
        columns={**COLUMNS, "trained": "tokens trained on"},
        rows=[_row(lab, seeds, name, each) for name, each in found.items()],
        verdict="measured",
        answer=_against_first(lab, found),
        seeds=seeds,
    )


def _against_first(lab: Lab, found: Mapping[str, Sequence[Figures]]) -> str:
    names = list(found)
    base = [one["accuracy"] for one in found[names[0]]]
    gaps = [f"{name} {difference([one['accuracy'] for one in found[name]], base)}" for name in names[1:]]
    return f"Accuracy less that of {names[0]}, seed by seed: {'; '.join(gaps)}."


def _foretold(name: str, by_seed: Sequence[Sequence[Figures]], stops: Sequence[int]) -> str:
    means = [Mean.of([runs[index]["accuracy"] for runs in by_seed]) for index in range(len(stops))]
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


def _last(run: Figures, metric: str) -> float:
    return run["metrics"][metric][-1]


def _sft(lab: Lab, seeds: Sequence[int]) -> Row:
    found = [before(lab, seed) for seed in seeds]
    return Row("after SFT", {key: Mean.of([one[key] for one in found]) for key in COLUMNS if key != "gain"})


def _row(lab: Lab, seeds: Sequence[int], name: str, found: Sequence[Figures]) -> Row:
    sft = [before(lab, seed)["accuracy"] for seed in seeds]
    figures: dict[str, Mean | float | str] = {
        key: Mean.of([one[key] for one in found])
        for key in ("accuracy", "reverse_kl", "drift", "step_seconds", "trained")
        if key in found[0]
    }
    return Row(name, {**figures, "gain": difference([one["accuracy"] for one in found], sft)})
