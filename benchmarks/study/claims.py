"""The paper's claims (a) to (e), each a finding over the same runs."""

from collections.abc import Mapping, Sequence

from benchmarks.study.cost import cost
from benchmarks.study.lab import Lab
from benchmarks.study.results.findings import Curve, Finding, Plot, Row, Verdict
from benchmarks.study.results.statistics import Mean, difference
from benchmarks.study.runs import (
    FRESH_SFT,
    FULL_A,
    IMPORTANCE_A,
    IMPORTANCE_B,
    LIVE_A,
    LIVE_B,
    MORE_SFT,
    PAPER_A,
    PAPER_B,
    Runs,
    run_seed,
)

COLUMNS = {
    "accuracy": "accuracy",
    "reverse_kl": "KL(student to its teacher), nats/token",
    "drift": "KL(student to SFT model), nats/token",
}
ALIKE = 0.03
"""Accuracies that differ by less than this, with their whole interval, match."""


def claims(lab: Lab, seeds: Sequence[int]) -> list[Finding]:
    """The five findings, and one that asks whether live distillation can be beaten."""
    runs = [run_seed(lab, seed) for seed in seeds]
    tests = (_improves, _matches, _consistency, _stays_near, cost, _beats)
    return [make(runs, lab.extent.stops, seeds) for make in tests]


def _improves(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    sft = [run.sft["accuracy"] for run in runs]
    arms = (LIVE_A, PAPER_A, IMPORTANCE_A)
    gains = {name: difference(_at(runs, name, stops[0], "accuracy"), sft) for name in arms}
    over_sft = {
        f"{name}, less {other}": _gaps(runs, name, other, stops, "accuracy")
        for other in (MORE_SFT, FRESH_SFT)
        for name in (LIVE_A, IMPORTANCE_A)
    }
    signs = [gain.sign for gain in gains.values()]
    return Finding(
        key="a",
        title="OPD improves on SFT",
        question="Is the student better after on-policy distillation than after SFT on the same teacher's answers?",
        columns=COLUMNS,
        rows=[_before(runs), *_rows(runs, (MORE_SFT, FRESH_SFT, *arms), stops)],
        verdict="holds" if min(signs) > 0 else "does not hold" if max(signs) < 0 else "not shown",
        answer=f"Accuracy after {stops[0]} steps less that after SFT, seed by seed: "
        + ", ".join(f"{name} {gain}" for name, gain in gains.items())
        + f". SFT could have gone on instead, for as many steps. {_told(over_sft, stops)}.",
        seeds=seeds,
        plots=[_plot(runs, key, head, (MORE_SFT, FRESH_SFT, *arms, FULL_A)) for key, head in COLUMNS.items()],
    )


def _matches(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    gaps = {name: _gaps(runs, name, LIVE_A, stops, "accuracy") for name in (PAPER_A, IMPORTANCE_A)}
    return Finding(
        key="b",
        title="Lightning matches live OPD at equal steps",
        question="Is a student trained on stored scores as good as one whose rollouts and scores are always fresh?",
        columns=COLUMNS,
        rows=_rows(runs, (LIVE_A, PAPER_A, IMPORTANCE_A), stops),
        verdict=_least([_match(gap[0]) for gap in gaps.values()]),
        answer=f"{_first(gaps, stops, 'Accuracy less that of live distillation')} A gap counts as a match where its "
        f"whole interval is above -{ALIKE}; at that stop this "
        + ", ".join(f"{_spoken(_match(gap[0]))} for {name}" for name, gap in gaps.items())
        + f". At all stops: {_told(gaps, stops)}.",
        seeds=seeds,
    )


def _spoken(verdict: Verdict) -> str:
    return "is not shown" if verdict == "not shown" else verdict


def _match(gap: Mean) -> Verdict:
    return "holds" if gap.low > -ALIKE else "does not hold" if gap.high < -ALIKE else "not shown"


def _least(verdicts: Sequence[Verdict]) -> Verdict:
    """Of several ways to do the same, what can be said of each."""
    return verdicts[0] if len(set(verdicts)) == 1 else "not shown"


def _beats(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    gaps = {COLUMNS[key]: _gaps(runs, FULL_A, LIVE_A, stops, key) for key in ("accuracy", "reverse_kl")}
    return Finding(
        key="full-support",
        title="KL over the teacher's whole distribution, at stored states, beats live OPD",
        question="Does the offline student end higher than the live one, when the scores hold the teacher's log-probs "
        "of the whole vocabulary and the loss is the KL over all of it?",
        columns=COLUMNS,
        rows=_rows(runs, (LIVE_A, IMPORTANCE_A, FULL_A), stops),
        verdict=_verdict(gaps["accuracy"][0].sign),
        answer=f"{_first(gaps, stops, 'Full support less live distillation')} At all stops: {_told(gaps, stops)}.",
        seeds=seeds,
    )


def _consistency(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    pairs = ((LIVE_A, LIVE_B), (PAPER_A, PAPER_B), (IMPORTANCE_A, IMPORTANCE_B))
    losses = {other: _gaps(runs, other, same, stops, "accuracy") for same, other in pairs}
    every = [loss.sign for each in losses.values() for loss in each]
    return Finding(
        key="c",
        title="Another teacher than that of SFT ends lower",
        question="After SFT on teacher A, does distillation from teacher B, equally skilled and of other habits, end "
        "lower, live and offline, however long it goes on?",
        columns=COLUMNS,
        rows=_rows(runs, [name for pair in pairs for name in pair], stops),
        verdict="holds" if max(every) < 0 else "does not hold" if max(every) > 0 else "not shown",
        answer=f"{_first(losses, stops, 'Accuracy less that of the same with teacher A')} At all stops: "
        f"{_told(losses, stops)}.",
        seeds=seeds,
        plots=[_plot(runs, key, head, (LIVE_A, LIVE_B, IMPORTANCE_A, IMPORTANCE_B)) for key, head in COLUMNS.items()],
    )


def _stays_near(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    gaps = {name: _gaps(runs, name, LIVE_A, stops, "drift") for name in (PAPER_A, IMPORTANCE_A)}
    paper = [gap.sign for gap in gaps[PAPER_A]]
    return Finding(
        key="d",
        title="The offline student stays nearer its SFT model",
        question="Is KL(student to SFT model) smaller after offline than after live distillation, at equal steps?",
        columns=COLUMNS,
        rows=_rows(runs, (LIVE_A, PAPER_A, IMPORTANCE_A), stops),
        verdict="holds" if max(paper) < 0 else "does not hold" if max(paper) > 0 else "not shown",
        answer=f"{_first(gaps, stops, 'Drift in nats a token less that of live distillation')} At all stops: "
        f"{_told(gaps, stops)}.",
        seeds=seeds,
    )


def _first(differences: Mapping[str, Sequence[Mean]], stops: Sequence[int], what: str) -> str:
    """A sentence that says what the differences are at the first stop."""
    told = ", ".join(f"{name} {by_stop[0]}" for name, by_stop in differences.items())
    return f"{what} after {stops[0]} steps, seed by seed: {told}."


def _told(differences: Mapping[str, Sequence[Mean]], stops: Sequence[int]) -> str:
    """`name: -0.010 ± 0.020 after 60, ...` of each arm."""
    return "; ".join(
        f"{name}: " + ", ".join(f"{each} after {stop}" for each, stop in zip(by_stop, stops, strict=True))
        for name, by_stop in differences.items()
    )


def _verdict(sign: int) -> Verdict:
    return "holds" if sign > 0 else "does not hold" if sign < 0 else "not shown"


def _gaps(runs: Sequence[Runs], one: str, other: str, stops: Sequence[int], key: str) -> list[Mean]:
    """one - other at every stop."""
    return [difference(_at(runs, one, stop, key), _at(runs, other, stop, key)) for stop in stops]


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
