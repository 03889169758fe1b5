"""The paper's claims (a) to (e), each a finding over the same runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.study.arms import DEFAULT, PAPER
from benchmarks.study.distil import alive, before, offline
from benchmarks.study.findings import Curve, Finding, Plot, Row, Verdict
from benchmarks.study.lab import Lab
from benchmarks.study.statistics import Mean, difference

COLUMNS = {
    "accuracy": "accuracy",
    "reverse_kl": "KL(student to its teacher), nats/token",
    "drift": "KL(student to SFT model), nats/token",
}
PARTS = ("weights", "rollouts", "scoring", "training")
GOAL = 4.0
"""Of live / Lightning, from the paper's 120 and 30 GPU-hours."""
ALIKE = 0.03
"""Accuracies that differ by less than this, with their whole interval, match."""
Stops = Sequence[Mapping[str, Any]]
"""What a run has come to at each of its stops."""


@dataclass(frozen=True)
class Runs:
    """Of one seed: the student before, and every way to distil it."""

    sft: Mapping[str, Any]
    arms: Mapping[str, Stops]
    rollouts: Mapping[str, float]
    scores: Mapping[str, float]
    """Seconds and tokens of the two phases of precompute, as `Lab.precompute` gives them."""


LIVE_A, LIVE_B = "live, teacher A", "live, teacher B"
PAPER_A, PAPER_B = "Lightning as in the paper, teacher A", "Lightning as in the paper, teacher B"
OURS_A, OURS_B = "Lightning, our default, teacher A", "Lightning, our default, teacher B"


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


def claims(lab: Lab, seeds: Sequence[int]) -> list[Finding]:
    """The five findings."""
    runs = [run_seed(lab, seed) for seed in seeds]
    return [make(runs, lab.extent.stops, seeds) for make in (_improves, _matches, _consistency, _stays_near, _cost)]


def _improves(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    sft = [run.sft["accuracy"] for run in runs]
    gain = difference(_at(runs, OURS_A, stops[0], "accuracy"), sft)
    paper = difference(_at(runs, PAPER_A, stops[0], "accuracy"), sft)
    live = difference(_at(runs, LIVE_A, stops[0], "accuracy"), sft)
    return Finding(
        key="a",
        title="OPD improves on SFT",
        question="Is the student better after on-policy distillation than after SFT on the same teacher's answers?",
        columns=COLUMNS,
        rows=[_before(runs), *_rows(runs, (LIVE_A, PAPER_A, OURS_A), stops)],
        verdict=_verdict(gain.sign),
        answer=f"Accuracy after {stops[0]} steps, less that after SFT, seed by seed: live {live}, Lightning as in the "
        f"paper {paper}, Lightning with our default {gain}.",
        seeds=seeds,
        plots=[_plot(runs, key, head, (LIVE_A, PAPER_A, OURS_A)) for key, head in COLUMNS.items()],
    )


def _matches(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    gaps = {
        name: [difference(_at(runs, name, stop, "accuracy"), _at(runs, LIVE_A, stop, "accuracy")) for stop in stops]
        for name in (PAPER_A, OURS_A)
    }
    ours = gaps[OURS_A][0]
    verdict: Verdict = "not shown"
    if ours.low > -ALIKE:
        verdict = "holds"
    elif ours.high < -ALIKE:
        verdict = "does not hold"
    told = "; ".join(
        f"{name}: " + ", ".join(f"{gap} after {stop}" for gap, stop in zip(each, stops, strict=True))
        for name, each in gaps.items()
    )
    return Finding(
        key="b",
        title="Lightning matches live OPD at equal steps",
        question="Is a student trained on stored scores as good as one whose rollouts and scores are always fresh?",
        columns=COLUMNS,
        rows=_rows(runs, (LIVE_A, PAPER_A, OURS_A), stops),
        verdict=verdict,
        answer=f"Accuracy less that of live distillation, seed by seed. {told}. A gap counts as a match where its "
        f"whole interval is above -{ALIKE}.",
        seeds=seeds,
    )


def _consistency(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    pairs = ((LIVE_A, LIVE_B), (PAPER_A, PAPER_B), (OURS_A, OURS_B))
    losses = {
        inconsistent: [
            difference(_at(runs, inconsistent, stop, "accuracy"), _at(runs, consistent, stop, "accuracy"))
            for stop in stops
        ]
        for consistent, inconsistent in pairs
    }
    every = [loss.sign for each in losses.values() for loss in each]
    told = "; ".join(
        f"{name}: " + ", ".join(f"{loss} after {stop}" for loss, stop in zip(each, stops, strict=True))
        for name, each in losses.items()
    )
    return Finding(
        key="c",
        title="Another teacher than that of SFT ends lower",
        question="After SFT on teacher A, does distillation from teacher B, equally skilled and of other habits, end "
        "lower, live and offline, however long it goes on?",
        columns=COLUMNS,
        rows=_rows(runs, [name for pair in pairs for name in pair], stops),
        verdict="holds" if max(every) < 0 else "does not hold" if max(every) > 0 else "not shown",
        answer=f"Accuracy less that of the same with teacher A, seed by seed. {told}.",
        seeds=seeds,
        plots=[_plot(runs, key, head, (LIVE_A, LIVE_B, OURS_A, OURS_B)) for key, head in COLUMNS.items()],
    )


def _stays_near(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    gaps = {
        name: [difference(_at(runs, name, stop, "drift"), _at(runs, LIVE_A, stop, "drift")) for stop in stops]
        for name in (PAPER_A, OURS_A)
    }
    paper = [gap.sign for gap in gaps[PAPER_A]]
    told = "; ".join(
        f"{name}: " + ", ".join(f"{gap} after {stop}" for gap, stop in zip(each, stops, strict=True))
        for name, each in gaps.items()
    )
    return Finding(
        key="d",
        title="The offline student stays nearer its SFT model",
        question="Is KL(student to SFT model) smaller after offline than after live distillation, at equal steps?",
        columns=COLUMNS,
        rows=_rows(runs, (LIVE_A, PAPER_A, OURS_A), stops),
        verdict="holds" if max(paper) < 0 else "does not hold" if max(paper) > 0 else "not shown",
        answer=f"Drift in nats a token, less that of live distillation, seed by seed. {told}.",
        seeds=seeds,
    )


def _cost(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    """One part at a time has the whole machine, in live distillation too, so seconds are device-seconds."""
    last = stops[-1]
    live = [_per_token(run.arms[LIVE_A][-1]["parts"]) for run in runs]
    reused = f"{last} steps on one dataset"
    ways = {
        "each rollout trained on once": [_lightning(run, run.rollouts["tokens"]) for run in runs],
        reused: [_lightning(run, run.arms[PAPER_A][-1]["trained"]) for run in runs],
    }
    ratios = {
        name: Mean.of([sum(a.values()) / sum(b.values()) for a, b in zip(live, costs, strict=True)])
        for name, costs in ways.items()
    }
    rows = [
        _cost_row("live", live),
        *(_cost_row(f"Lightning, {name}", costs, ratios[name]) for name, costs in ways.items()),
    ]
    starts = Mean.of([run.rollouts["seconds"] + run.scores["seconds"] for run in runs])
    works = Mean.of([run.rollouts["working_s"] + run.scores["working_s"] for run in runs])
    told = "; ".join(f"{name}: {ratio}" for name, ratio in ratios.items())
    least = ratios[reused]
    return Finding(
        key="e",
        title=f"Device-seconds per trained token: live / Lightning of at least {GOAL}",
        question="How much machine time does a trained token cost, all of Lightning's own precompute counted?",
        columns={
            "weights": "weights to the engine, ms/token",
            "rollouts": "rollouts",
            "scoring": "scoring",
            "training": "training",
            "total": "all",
            "ratio": "live / this",
            "equal": f"to live's accuracy after {stops[0]} steps",
        },
        rows=[*rows, *_to_equal_accuracy(runs, stops)],
        verdict="holds" if least.low >= GOAL else "does not hold" if least.high < GOAL else "not shown",
        answer=f"Live takes this many times the device-seconds of Lightning. {told}. The start of the engines is left "
        f"out on both sides: precompute took {works} s at work and {starts} s in all, which a second run on the same "
        "dataset does not pay again.",
        seeds=seeds,
        timing=True,
    )


def _to_equal_accuracy(runs: Sequence[Runs], stops: Sequence[int]) -> list[Row]:
    """Device-seconds, precompute included, until the first stop at which an arm is as good as live was at its first."""
    rows = []
    for name in (LIVE_A, PAPER_A, OURS_A):
        seconds = []
        for run in runs:
            target = run.arms[LIVE_A][0]["accuracy"]
            reached = next((found for found in run.arms[name] if found["accuracy"] >= target), None)
            if reached is not None:
                seconds.append(_seconds(run, reached))
        told = f"{sum(seconds) / len(seconds):.0f} s in {len(seconds)} of {len(runs)} seeds" if seconds else "never"
        rows.append(Row(f"to equal accuracy: {name}", {"equal": told}))
    return rows


def _seconds(run: Runs, found: Mapping[str, Any]) -> float:
    """Device-seconds that an arm had taken when it came to a stop."""
    if "parts" in found:
        return sum(found["parts"][part] for part in PARTS)
    return run.rollouts["working_s"] + run.scores["working_s"] + found["step_seconds"] * found["step"]


def _per_token(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: parts[name] / parts["tokens"] for name in PARTS}


def _lightning(run: Runs, trained: float) -> dict[str, float]:
    """Seconds per trained token when so many tokens are trained on one precompute."""
    last = run.arms[PAPER_A][-1]
    return {
        "weights": 0.0,
        "rollouts": run.rollouts["working_s"] / trained,
        "scoring": run.scores["working_s"] / trained,
        "training": last["step_seconds"] * last["step"] / last["trained"],
    }


def _cost_row(name: str, costs: Sequence[Mapping[str, float]], ratio: Mean | None = None) -> Row:
    figures = {part: Mean.of([1e3 * cost[part] for cost in costs]) for part in PARTS}
    total = {"total": Mean.of([1e3 * sum(cost.values()) for cost in costs])}
    return Row(name, {**figures, **total, **({"ratio": ratio} if ratio else {})})


def _verdict(sign: int) -> Verdict:
    return "holds" if sign > 0 else "does not hold" if sign < 0 else "not shown"


def _at(runs: Sequence[Runs], name: str, stop: int, key: str) -> list[float]:
    """A figure of an arm after so many steps, by seed."""
    return [next(found[key] for found in run.arms[name] if found["step"] == stop) for run in runs]


def _before(runs: Sequence[Runs]) -> Row:
    return Row("after SFT", {key: Mean.of([run.sft[key] for run in runs]) for key in COLUMNS})


def _rows(runs: Sequence[Runs], names: Sequence[str], stops: Sequence[int]) -> list[Row]:
    return [
        Row(f"{name}, {stop} steps", {key: Mean.of(_at(runs, name, stop, key)) for key in COLUMNS})
        for name in names
        for stop in stops
    ]


def _plot(runs: Sequence[Runs], key: str, head: str, names: Sequence[str]) -> Plot:
    before = (0, Mean.of([run.sft[key] for run in runs]))
    stops = [found["step"] for found in runs[0].arms[names[0]]]
    curves = [Curve(name, [before, *((stop, Mean.of(_at(runs, name, stop, key))) for stop in stops)]) for name in names]
    return Plot(head, "optimizer steps", head, curves)
