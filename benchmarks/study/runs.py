"""What the claims are tested on: of each seed, the student before, and every way to distil it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.arms import FULL_SUPPORT, IMPORTANCE, PAPER, Arm
from benchmarks.study.distil import Result, alive, before, more_sft, offline
from benchmarks.study.lab import Lab

LIVE_A, LIVE_B = "live, teacher A", "live, teacher B"
PAPER_A, PAPER_B = "Lightning as in the paper, teacher A", "Lightning as in the paper, teacher B"
IMPORTANCE_A, IMPORTANCE_B = "Lightning, importance, teacher A", "Lightning, importance, teacher B"
FULL_A, FULL_B = "Lightning, full support, teacher A", "Lightning, full support, teacher B"
MORE_SFT, FRESH_SFT = "SFT, continued", "SFT, continued on as many fresh answers as rollouts"


@dataclass(frozen=True)
class Runs:
    """Of one seed: both teachers, the student after SFT, and every way to go on."""

    teachers: Mapping[str, Mapping[str, float]]
    """What `a` and `b` are worth by themselves."""
    sft: Result
    arms: Mapping[str, Sequence[Result]]
    """What each has come to at each of its stops."""


def run_seed(lab: Lab, seed: int) -> Runs:
    """All runs of a seed, as far as they are not there yet."""
    stops = lab.extent.stops
    arms = {
        PAPER_A: distilled(lab, seed, "a", PAPER, stops),
        IMPORTANCE_A: distilled(lab, seed, "a", IMPORTANCE, stops),
        FULL_A: distilled(lab, seed, "a", FULL_SUPPORT, stops),
        PAPER_B: distilled(lab, seed, "b", PAPER, stops),
        IMPORTANCE_B: distilled(lab, seed, "b", IMPORTANCE, stops),
        FULL_B: distilled(lab, seed, "b", FULL_SUPPORT, stops),
        MORE_SFT: more_sft(lab, "more-sft", lab.answers(), stops, seed),
        FRESH_SFT: more_sft(lab, "fresh-sft", lab.fresh_answers(), stops, seed),
        LIVE_A: distilled_live(lab, seed, "a", PAPER, stops),
        LIVE_B: distilled_live(lab, seed, "b", PAPER, stops),
    }
    return Runs({name: lab.skill(name, seed) for name in "ab"}, before(lab, seed), arms)


def distilled(lab: Lab, seed: int, teacher: str, arm: Arm, stops: Sequence[int]) -> list[Result]:
    """What an arm comes to on the rollouts of the student after SFT, as this teacher graded them."""
    data = graded(lab, seed, teacher)
    return offline(lab, f"seed-{seed}/{teacher}", lab.student(seed), data, teacher, arm, stops, seed)


def distilled_live(lab: Lab, seed: int, teacher: str, arm: Arm, stops: Sequence[int], **more: Any) -> list[Result]:
    """What an arm comes to with rollouts of the student of now, which this teacher grades at once."""
    return alive(lab, f"seed-{seed}/{teacher}", lab.student(seed), teacher, arm, stops, seed, **more)


def graded(lab: Lab, seed: int, teacher: str) -> Path:
    """Rollouts of the student after SFT with a teacher's log-probs of the whole vocabulary."""
    rollouts = lab.rollouts(f"seed-{seed}", lab.student(seed), seed, lab.extent.rollouts)
    return lab.scored(f"seed-{seed}", rollouts, teacher, topk=lab.vocabulary)
