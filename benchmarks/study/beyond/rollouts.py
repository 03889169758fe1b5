"""Other rollouts: as many as live distillation samples, cut off early, at other temperatures."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.arms import FULL_SUPPORT, IMPORTANCE, PAPER, TEMPERATURES, TRUNCATIONS, Arm
from benchmarks.study.beyond.rows import COLUMNS, LIVE, Found, against_first, row
from benchmarks.study.distil import Result, offline
from benchmarks.study.lab import Lab
from benchmarks.study.results.findings import Finding
from benchmarks.study.runs import distilled, distilled_live


def as_many(lab: Lab, seeds: Sequence[int]) -> Finding:
    """As many rollouts, to as many questions, as live distillation has in as many steps."""
    step, few = lab.extent.stops[0], lab.extent.rollouts
    many = step * lab.extent.rows_per_step
    found: Found = {LIVE: [distilled_live(lab, seed, "a", PAPER, lab.extent.stops)[0] for seed in seeds]}
    for arm in (PAPER, IMPORTANCE, FULL_SUPPORT):
        found[f"{arm.name}, {few:,} rollouts"] = [distilled(lab, seed, "a", arm, [step])[0] for seed in seeds]
        found[f"{arm.name}, {many:,} rollouts"] = [_on_many(lab, seed, arm, many, step) for seed in seeds]
    return Finding(
        key="as-many",
        title="As many rollouts as live distillation",
        question=f"Is Lightning behind because it goes {many / few:g} times over {few:,} rollouts in {step} steps, "
        f"where live distillation has {many:,}, or because its rollouts are of an older student?",
        columns=COLUMNS,
        rows=[row(lab, seeds, name, each) for name, each in found.items()],
        verdict="measured",
        answer=against_first(found),
        seeds=seeds,
    )


def _on_many(lab: Lab, seed: int, arm: Arm, many: int, step: int) -> Result:
    start, name = lab.student(seed), f"seed-{seed}/as-many"
    data = lab.scored(name, lab.rollouts(name, start, seed, many), "a", topk=lab.vocabulary)
    return offline(lab, name, start, data, "a", arm, [step], seed)[0]


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
        rows=[row(lab, seeds, name, each) for name, each in found.items()],
        verdict="measured",
        answer=against_first(found),
        seeds=seeds,
    )
