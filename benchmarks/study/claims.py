"""The paper's claims (a) to (e), each a finding over the same runs."""

from collections.abc import Mapping, Sequence

from benchmarks.study.cost import cost
from benchmarks.study.findings import Curve, Finding, Plot, Row, Verdict
from benchmarks.study.lab import Lab
from benchmarks.study.runs import LIVE_A, LIVE_B, OURS_A, OURS_B, PAPER_A, PAPER_B, Runs, run_seed
from benchmarks.study.statistics import Mean, difference

COLUMNS = {
    "accuracy": "accuracy",
    "reverse_kl": "KL(student to its teacher), nats/token",
    "drift": "KL(student to SFT model), nats/token",
}
ALIKE = 0.03
"""Accuracies that differ by less than this, with their whole interval, match."""


def claims(lab: Lab, seeds: Sequence[int]) -> list[Finding]:
    """The five findings."""
    runs = [run_seed(lab, seed) for seed in seeds]
    return [make(runs, lab.extent.stops, seeds) for make in (_improves, _matches, _consistency, _stays_near, cost)]


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
    told = _told(gaps, stops)
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
    told = _told(losses, stops)
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
    told = _told(gaps, stops)
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


def _told(differences: Mapping[str, Sequence[Mean]], stops: Sequence[int]) -> str:
    """`name: -0.010 ± 0.020 after 60, ...` of each arm."""
    return "; ".join(
        f"{name}: " + ", ".join(f"{each} after {stop}" for each, stop in zip(by_stop, stops, strict=True))
        for name, by_stop in differences.items()
    )


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
