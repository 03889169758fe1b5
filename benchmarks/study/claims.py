"""The paper's claims (a) to (d), each a finding over the same runs, and whether live distillation can be beaten.

Every claim has one rule, which its answer states; an interval that leaves it open makes it `not shown`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.study.results.findings import Curve, Finding, Plot, Row, Verdict
from benchmarks.study.results.statistics import Mean, difference
from benchmarks.study.runs import (
    FRESH_SFT,
    FULL_A,
    FULL_B,
    IMPORTANCE_A,
    IMPORTANCE_B,
    LIVE_A,
    LIVE_B,
    MORE_SFT,
    PAPER_A,
    PAPER_B,
    Runs,
)

COLUMNS = {
    "accuracy": "accuracy",
    "reverse_kl": "KL(student to its teacher), nats/token",
    "drift": "KL(student to SFT model), nats/token",
}
MARGIN = 0.03
"""Accuracies are alike where the one is at most this much lower, with its whole interval."""


def claims(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> list[Finding]:
    """The findings over these runs, one of each seed."""
    tests = (_improves, _matches, _consistency_live, _consistency_offline, _stays_near, _beats)
    return [make(runs, stops, seeds) for make in tests]


def _improves(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    arms = (LIVE_A, PAPER_A, IMPORTANCE_A)
    gains = {name: _gains(runs, name, stops[0]) for name in arms}
    over = {
        other: {name: _gaps(runs, name, other, stops, "accuracy") for name in arms} for other in (MORE_SFT, FRESH_SFT)
    }
    farther = {name: _gaps(runs, name, FRESH_SFT, stops, "reverse_kl") for name in arms}
    signs = [*(gain.sign for gain in gains.values()), *(by_stop[0].sign for by_stop in over[MORE_SFT].values())]
    return Finding(
        key="a",
        title="OPD improves on SFT that has no more answers",
        question="Is the student better after on-policy distillation than after SFT on the same answers, also "
        "where SFT goes on?",
        columns=COLUMNS,
        rows=[*_before(runs), *_rows(runs, (MORE_SFT, FRESH_SFT, *arms), stops)],
        verdict=_all(signs),
        answer=f"Accuracy after {stops[0]} steps less that after SFT, seed by seed: {_listed(gains)}. Less that of SFT "
        f"which goes on for as many steps on the same answers: {_listed(_at_first(over[MORE_SFT]))}. The claim holds "
        "where all of these are above zero. SFT on as many fresh answers of the teacher as there are rollouts, which "
        "only who has the teacher can have, is no part of it; less its accuracy: "
        f"{_listed(_at_first(over[FRESH_SFT]))}; less its KL to the teacher: {_listed(_at_first(farther))}. At all "
        f"stops, accuracy less that of SFT continued: {_told(over[MORE_SFT], stops)}; less that of SFT on fresh "
        f"answers: {_told(over[FRESH_SFT], stops)}.",
        would_hold=f"Above SFT that goes on, at all stops: {_names(over[MORE_SFT], lambda gap: gap.sign > 0)}.",
        seeds=seeds,
        plots=[_plot(runs, key, head, (MORE_SFT, FRESH_SFT, *arms, FULL_A)) for key, head in COLUMNS.items()],
    )


def _matches(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    gaps = {name: _gaps(runs, name, LIVE_A, stops, "accuracy") for name in (PAPER_A, IMPORTANCE_A, FULL_A)}
    paper = gaps[PAPER_A]
    return Finding(
        key="b",
        title="Lightning matches live OPD at equal steps",
        question="Is a student trained on stored scores as good as one whose rollouts and scores are always fresh?",
        columns=COLUMNS,
        rows=_rows(runs, (LIVE_A, PAPER_A, IMPORTANCE_A, FULL_A), stops),
        verdict=_all([int(gap.low > -MARGIN) - int(gap.high < -MARGIN) for gap in paper]),
        answer=f"Accuracy less that of live distillation after {stops[0]} steps, seed by seed: "
        f"{_listed(_at_first(gaps))}. The claim is judged on the paper's own loss, at all stops: it matches where the "
        f"whole interval is above -{MARGIN}. {_told(gaps, stops)}. Live distillation asks fresh questions at "
        "every step, where Lightning goes over the same rollouts again.",
        would_hold="With another loss it holds at all stops for: "
        f"{_names(gaps, lambda gap: gap.low > -MARGIN)}. What more rollouts and other learning rates do is measured "
        "below.",
        seeds=seeds,
    )


def _consistency_live(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    return _consistency(runs, stops, seeds, "c, live", ((LIVE_A, LIVE_B),))


def _consistency_offline(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    return _consistency(
        runs, stops, seeds, "c, offline", ((PAPER_A, PAPER_B), (IMPORTANCE_A, IMPORTANCE_B), (FULL_A, FULL_B))
    )


def _consistency(
    runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int], key: str, pairs: Sequence[tuple[str, str]]
) -> Finding:
    losses = {other: _gaps(runs, other, same, stops, "accuracy") for same, other in pairs}
    way = key.split(", ")[1]
    names = [name for pair in pairs for name in pair]
    return Finding(
        key=key.replace(", ", "-"),
        title=f"Another teacher than that of SFT ends lower, {way}, after {stops[-1]} steps",
        question=f"After SFT on teacher A, does {way} distillation from teacher B, as skilled and of other habits, end "
        "lower?",
        columns=COLUMNS,
        rows=[*_teachers(runs), *_rows(runs, names, stops)],
        verdict=_all([_is_lower(by_stop[-1]) for by_stop in losses.values()]),
        answer=f"Accuracy less that of the same with teacher A after {stops[-1]} steps, seed by seed: "
        f"{_listed({name: by_stop[-1] for name, by_stop in losses.items()})}. The claim is judged there: it "
        f"holds where every interval is wholly below zero, and does not where one is wholly above -{MARGIN}, within "
        f"which accuracies count as alike. On the way: {_told(losses, stops)}.",
        would_hold="Fewer steps, if anything: "
        + "; ".join(
            f"{name} is lower after {_where(by_stop, stops, lambda gap: gap.sign < 0)}"
            for name, by_stop in losses.items()
        )
        + ".",
        seeds=seeds,
        plots=[_plot(runs, key, head, names) for key, head in COLUMNS.items()],
    )


def _stays_near(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    gaps = {name: _gaps(runs, name, LIVE_A, stops, "drift") for name in (PAPER_A, IMPORTANCE_A, FULL_A)}
    return Finding(
        key="d",
        title="The offline student stays nearer its SFT model",
        question="Is KL(student to SFT model) smaller after offline than after live distillation, at equal steps?",
        columns=COLUMNS,
        rows=_rows(runs, (LIVE_A, PAPER_A, IMPORTANCE_A, FULL_A), stops),
        verdict=_all([-gap.sign for gap in gaps[PAPER_A]]),
        answer=f"Drift in nats a token less that of live distillation after {stops[0]} steps, seed by seed: "
        f"{_listed(_at_first(gaps))}. The claim is judged on the paper's own loss, at all stops. {_told(gaps, stops)}.",
        would_hold=f"With another loss it holds at all stops for: {_names(gaps, lambda gap: gap.sign < 0)}. What other "
        "learning rates do is measured below.",
        seeds=seeds,
    )


def _beats(runs: Sequence[Runs], stops: Sequence[int], seeds: Sequence[int]) -> Finding:
    gaps = {COLUMNS[key]: _gaps(runs, FULL_A, LIVE_A, stops, key) for key in ("accuracy", "reverse_kl")}
    accuracy, distance = gaps.values()
    return Finding(
        key="full-support",
        title="KL over the teacher's whole distribution, at stored states, beats live OPD with the paper's loss",
        question=f"Is the offline student after {stops[0]} steps right more often and nearer its teacher than the live "
        "one, when scores hold the teacher's log-probs of the whole vocabulary and the loss is the KL over all of it?",
        columns=COLUMNS,
        rows=_rows(runs, (LIVE_A, IMPORTANCE_A, FULL_A), stops),
        verdict=_all([accuracy[0].sign, -distance[0].sign]),
        answer=f"Full support less live distillation after {stops[0]} steps, seed by seed: {_listed(_at_first(gaps))}. "
        f"The claim holds where both are better. At all stops: {_told(gaps, stops)}. Live distillation had the paper's "
        "loss; with the same loss as here it stands in the table of objectives.",
        would_hold="To ask for one of the two alone. Better, with the whole interval, after these steps: "
        + "; ".join(
            f"{name}: {_where(by_stop, stops, lambda gap, sign=sign: gap.sign == sign)}"
            for sign, (name, by_stop) in zip((1, -1), gaps.items(), strict=True)
        )
        + ".",
        seeds=seeds,
    )


def _all(signs: Sequence[int]) -> Verdict:
    """1 speaks for the claim, -1 against it, 0 leaves it open; it takes all to hold, and one to fall."""
    return "holds" if min(signs) > 0 else "does not hold" if min(signs) < 0 else "not shown"


def _is_lower(gap: Mean) -> int:
    """1 where the whole interval is below zero, -1 where it leaves no more than MARGIN, 0 where it is open."""
    return 1 if gap.sign < 0 else -1 if gap.low > -MARGIN else 0


def _gaps(runs: Sequence[Runs], one: str, other: str, stops: Sequence[int], key: str) -> list[Mean]:
    """one - other at every stop."""
    return [difference(_at(runs, one, stop, key), _at(runs, other, stop, key)) for stop in stops]


def _gains(runs: Sequence[Runs], name: str, stop: int) -> Mean:
    return difference(_at(runs, name, stop, "accuracy"), [run.sft["accuracy"] for run in runs])


def _at(runs: Sequence[Runs], name: str, stop: int, key: str) -> list[float]:
    """A figure of an arm after so many steps, by seed."""
    return [next(found[key] for found in run.arms[name] if found["step"] == stop) for run in runs]


def _at_first(differences: Mapping[str, Sequence[Mean]]) -> dict[str, Mean]:
    return {name: by_stop[0] for name, by_stop in differences.items()}


def _listed(figures: Mapping[str, Mean]) -> str:
    return "; ".join(f"{name}: {figure}" for name, figure in figures.items())


def _names(differences: Mapping[str, Sequence[Mean]], fits: Callable[[Mean], bool]) -> str:
    """Arms whose difference fits at every stop."""
    return "; ".join(name for name, by_stop in differences.items() if all(map(fits, by_stop))) or "none"


def _where(by_stop: Sequence[Mean], stops: Sequence[int], fits: Callable[[Mean], bool]) -> str:
    """The stops at which a difference fits."""
    return ", ".join(str(stop) for stop, gap in zip(stops, by_stop, strict=True) if fits(gap)) or "none"


def _told(differences: Mapping[str, Sequence[Mean]], stops: Sequence[int]) -> str:
    """`name: -0.010 ± 0.020 after 60, ...` of each arm."""
    return "; ".join(
        f"{name}: " + ", ".join(f"{each} after {stop}" for each, stop in zip(by_stop, stops, strict=True))
        for name, by_stop in differences.items()
    )


def _teachers(runs: Sequence[Runs]) -> list[Row]:
    return [
        Row(f"teacher {name.upper()}", {"accuracy": Mean.of([run.teachers[name]["accuracy"] for run in runs])})
        for name in "ab"
    ]


def _before(runs: Sequence[Runs]) -> list[Row]:
    return [
        _teachers(runs)[0],
        Row("after SFT", {key: Mean.of([run.sft[key] for run in runs]) for key in COLUMNS}),
    ]


def _rows(runs: Sequence[Runs], names: Iterable[str], stops: Sequence[int]) -> list[Row]:
    return [
        Row(f"{name}, {stop} steps", {key: Mean.of(_at(runs, name, stop, key)) for key in COLUMNS})
        for name in names
        for stop in stops
    ]


def _plot(runs: Sequence[Runs], key: str, head: str, names: Sequence[str]) -> Plot:
    before = (0, Mean.of([run.sft[key] for run in runs]))
    stops = [found["step"] for found in runs[0].arms[names[0]]]

    def curve(name: str) -> Curve:
        known = key != "reverse_kl" or name not in (LIVE_B, PAPER_B, IMPORTANCE_B, FULL_B)  # before: of teacher A alone
        after = [(stop, Mean.of(_at(runs, name, stop, key))) for stop in stops]
        return Curve(name, [before, *after] if known else after)

    return Plot(head, "optimizer steps", head, [curve(name) for name in names])
