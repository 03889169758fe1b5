"""What the claims are tested on: of each seed, the student before, and every way to distil it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.study.arms import DEFAULT, PAPER
from benchmarks.study.distil import alive, before, offline
from benchmarks.study.lab import Lab

Stops = Sequence[Mapping[str, Any]]
"""What a run has come to at each of its stops."""
LIVE_A, LIVE_B = "live, teacher A", "live, teacher B"
PAPER_A, PAPER_B = "Lightning as in the paper, teacher A", "Lightning as in the paper, teacher B"
OURS_A, OURS_B = "Lightning, our default, teacher A", "Lightning, our default, teacher B"


@dataclass(frozen=True)
class Runs:
    """Of one seed: the student before, and every way to distil it."""

    sft: Mapping[str, Any]
    arms: Mapping[str, Stops]
    rollouts: Mapping[str, float]
    scores: Mapping[str, float]
    """Seconds and tokens of the two phases of precompute, as `Lab.precompute` gives them."""


def run_seed(lab: Lab, seed: int) -> Runs:
    """All runs of a seed, as far as they are not there yet."""
    start, extent, place = lab.student(seed), lab.extent, f"seed-{seed}"
    stops = extent.stops
    rollouts = lab.rollouts(f"{place}/rollouts", start, seed, extent.rollouts)
    arms, scores = dict[str, Stops](), {}
    for teacher, live, paper, ours in (("a", LIVE_A, PAPER_A, OURS_A), ("b", LIVE_B, PAPER_B, OURS_B)):
        data = lab.scored(f"{place}/scored-{teacher}", rollouts, teacher)
        scores[teacher] = lab.precompute(data)
        arms[paper] = offline(lab, f"{place}/paper-{teacher}", start, data, teacher, stops, seed, PAPER)
        arms[ours] = offline(lab, f"{place}/ours-{teacher}", start, data, teacher, stops, seed, DEFAULT)
        arms[live] = alive(lab, f"{place}/live-{teacher}", start, teacher, stops, seed, PAPER)
    return Runs(before(lab, seed), arms, lab.precompute(rollouts), scores["a"])
