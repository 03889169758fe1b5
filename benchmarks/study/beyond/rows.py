"""Rows and differences that the findings beyond the paper share."""

from collections.abc import Sequence

from benchmarks.study.distil import Result, before
from benchmarks.study.lab import Lab
from benchmarks.study.results.findings import Row
from benchmarks.study.results.statistics import Mean, difference

COLUMNS = {
    "accuracy": "accuracy",
    "gain": "gain on SFT",
    "reverse_kl": "KL(student to teacher), nats/token",
    "drift": "KL(student to SFT model), nats/token",
}
LIVE = "live, paper"
"""Live distillation with the paper's loss, as rows call it."""
Found = dict[str, list[Result]]
"""Results of an arm by seed, in their order."""


def sft_row(lab: Lab, seeds: Sequence[int]) -> Row:
    """The student before distillation."""
    found = [before(lab, seed) for seed in seeds]
    return Row("after SFT", {key: Mean.of([one[key] for one in found]) for key in COLUMNS if key != "gain"})


def row(lab: Lab, seeds: Sequence[int], name: str, found: Sequence[Result]) -> Row:
    """An arm, with whatever its results tell."""
    figures: dict[str, Mean | float | str] = {
        key: Mean.of([one[key] for one in found])
        for key in ("accuracy", "reverse_kl", "drift", "trained", "worst")
        if key in found[0]
    }
    return Row(name, {**figures, "gain": gain(lab, seeds, found)})


def gain(lab: Lab, seeds: Sequence[int], found: Sequence[Result]) -> Mean:
    """Accuracy of these less that of the student before, of the same seeds."""
    sft = [before(lab, seed)["accuracy"] for seed in seeds]
    return difference([one["accuracy"] for one in found], sft)


def against_first(found: Found) -> str:
    """Every arm less the first, in a sentence."""
    first, *others = found
    gaps = [f"{name} {against(found[name], found[first])}" for name in others]
    return f"Accuracy less that of {first}, seed by seed: {'; '.join(gaps)}."


def against(found: Sequence[Result], others: Sequence[Result], key: str = "accuracy") -> Mean:
    """A figure of these less that of others, of the same seeds."""
    return difference([one[key] for one in found], [one[key] for one in others])
