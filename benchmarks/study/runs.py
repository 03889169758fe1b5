"""What the claims are tested on: of each seed, the student before, and every way to distil it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.arms import FULL_SUPPORT, IMPORTANCE, PAPER
from benchmarks.study.distil import alive, before, more_sft, offline
from benchmarks.study.lab import Lab

Stops = Sequence[Mapping[str, Any]]
"""What a run has come to at each of its stops."""
LIVE_A, LIVE_B = "live, teacher A", "live, teacher B"
PAPER_A, PAPER_B = "Lightning as in the paper, teacher A", "Lightning as in the paper, teacher B"
IMPORTANCE_A, IMPORTANCE_B = "Lightning, importance, teacher A", "Lightning, importance, teacher B"
FULL_A = "Lightning, full support, teacher A"
MORE_SFT, FRESH_SFT = "SFT, continued", "SFT, continued on as many fresh answers as there are rollouts"


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
    start, stops, place = lab.student(seed), lab.extent.stops, f"seed-{seed}"
    arms, scores = dict[str, Stops](), {}
    for teacher, live, paper, importance in (
        ("a", LIVE_A, PAPER_A, IMPORTANCE_A),
        ("b", LIVE_B, PAPER_B, IMPORTANCE_B),
    ):
        data = scored(lab, seed, teacher)
        scores[teacher] = lab.precompute(data)
        arms[paper] = offline(lab, f"{place}/paper-{teacher}", start, data, teacher, stops, seed, PAPER)
        arms[importance] = offline(lab, f"{place}/importance-{teacher}", start, data, teacher, stops, seed, IMPORTANCE)
        arms[live] = alive(lab, f"{place}/live-{teacher}", start, teacher, stops, seed, PAPER)
    full = fully_scored(lab, seed)
    arms[FULL_A] = offline(lab, f"{place}/full-a", start, full, "a", stops, seed, FULL_SUPPORT)
    arms[MORE_SFT] = more_sft(lab, f"{place}/more-sft", lab.answers(), stops, seed)
    arms[FRESH_SFT] = more_sft(lab, f"{place}/fresh-sft", lab.fresh_answers(), stops, seed)
    return Runs(before(lab, seed), arms, lab.precompute(rollouts(lab, seed)), scores["a"])


def rollouts(lab: Lab, seed: int) -> Path:
    """Those of the student after SFT."""
    return lab.rollouts(f"seed-{seed}/rollouts", lab.student(seed), seed, lab.extent.rollouts)


def scored(lab: Lab, seed: int, teacher: str) -> Path:
    """The same rollouts with what a teacher gives each token."""
    return lab.scored(f"seed-{seed}/scored-{teacher}", rollouts(lab, seed), teacher)


def fully_scored(lab: Lab, seed: int) -> Path:
    """The same rollouts with teacher A's log-probs of the whole vocabulary beside each token."""
    return lab.scored(f"seed-{seed}/scored-a-full", rollouts(lab, seed), "a", topk=lab.vocabulary)
