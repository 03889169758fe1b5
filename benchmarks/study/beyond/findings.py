"""What is measured beyond the paper."""

from collections.abc import Sequence

from benchmarks.study.beyond.objectives import objectives
from benchmarks.study.beyond.rates import learning_rate, warm_up
from benchmarks.study.beyond.rollouts import as_many, temperature, truncation
from benchmarks.study.beyond.rounds import rounds
from benchmarks.study.beyond.staleness import staleness
from benchmarks.study.lab import Lab
from benchmarks.study.results.findings import Finding

ALL = (objectives, learning_rate, warm_up, as_many, staleness, rounds, truncation, temperature)


def beyond(lab: Lab, seeds: Sequence[int]) -> list[Finding]:
    """All of them."""
    return [make(lab, seeds) for make in ALL]
