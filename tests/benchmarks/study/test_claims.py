"""Verdicts and differences from runs made by hand: a comparison that is turned round would be published as a result."""

from collections.abc import Mapping, Sequence

import pytest

from benchmarks.study.arms import Extent
from benchmarks.study.claims import COLUMNS, claims
from benchmarks.study.cost import PARTS, SAMPLED, WHOLE, cost
from benchmarks.study.results.findings import Finding
from benchmarks.study.results.statistics import Mean
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

STOPS = (60, 120)
SEEDS = range(3)
SFT = 0.7
FIGURES = {
    MORE_SFT: (0.71, 0.06, 0.01),
    FRESH_SFT: (0.85, 0.02, 0.01),
    LIVE_A: (0.90, 0.02, 0.04),
    LIVE_B: (0.80, 0.05, 0.70),
    PAPER_A: (0.89, 0.03, 0.03),
    PAPER_B: (0.30, 0.60, 0.80),
    IMPORTANCE_A: (0.90, 0.02, 0.02),
    IMPORTANCE_B: (0.30, 0.60, 0.80),
    FULL_A: (0.93, 0.01, 0.01),
    FULL_B: (0.40, 0.60, 0.80),
}
"""Accuracy, reverse KL and drift of each arm: every claim holds."""


def runs_of(figures: Mapping[str, tuple[float, float, float]], last: Mapping[str, float] | None = None) -> list[Runs]:
    """The same runs for three seeds, of which each is a little better than the one before.

    Args:
        last: accuracies at the last stop that are others than at the first.
    """

    def run(seed: int) -> Runs:
        noise = 0.001 * seed
        arms = {
            name: [
                {
                    "step": stop,
                    "accuracy": ((last or {}).get(name, accuracy) if stop == STOPS[-1] else accuracy) + noise,
                    "reverse_kl": reverse_kl,
                    "drift": drift,
                }
                for stop in STOPS
            ]
            for name, (accuracy, reverse_kl, drift) in figures.items()
        }
        return Runs(
            {"a": {"accuracy": 0.85}, "b": {"accuracy": 0.86}},
            {"accuracy": SFT + noise, "reverse_kl": 0.06, "drift": 0.0},
            arms,
        )

    return [run(seed) for seed in SEEDS]


def found(runs: Sequence[Runs]) -> dict[str, Finding]:
    return {finding.key: finding for finding in claims(runs, STOPS, SEEDS)}


def changed(arm: str, **figures: float) -> dict[str, tuple[float, float, float]]:
    """The runs with other figures of one arm."""
    values = dict(zip(COLUMNS, FIGURES[arm], strict=True)) | figures
    return {**FIGURES, arm: (values["accuracy"], values["reverse_kl"], values["drift"])}


def test_all_claims_hold_where_they_do() -> None:
    assert {key: finding.verdict for key, finding in found(runs_of(FIGURES)).items()} == dict.fromkeys(
        ("a", "b", "c-live", "c-offline", "d", "full-support"), "holds"
    )


@pytest.mark.parametrize(
    ("key", "figures"),
    [
        ("a", changed(PAPER_A, accuracy=SFT - 0.1)),
        ("a", changed(MORE_SFT, accuracy=0.895)),
        ("b", changed(PAPER_A, accuracy=0.80)),
        ("c-live", changed(LIVE_B, accuracy=0.95)),
        ("c-offline", changed(PAPER_B, accuracy=0.95)),
        ("d", changed(PAPER_A, drift=0.05)),
        ("full-support", changed(FULL_A, accuracy=0.88)),
        ("full-support", changed(FULL_A, reverse_kl=0.03)),
    ],
)
def test_a_claim_falls_with_what_speaks_against_it(key: str, figures: dict[str, tuple[float, float, float]]) -> None:
    assert found(runs_of(figures))[key].verdict == "does not hold"


def test_what_varies_more_than_it_differs_is_not_shown() -> None:
    runs = runs_of(FIGURES)
    for seed, run in enumerate(runs):
        for result in run.arms[LIVE_B]:
            result["accuracy"] = 0.90 + 0.2 * (seed - 1)
    assert found(runs)["c-live"].verdict == "not shown"


def test_however_long_is_judged_at_the_last_stop() -> None:
    assert found(runs_of(FIGURES, last={LIVE_B: 0.95}))["c-live"].verdict == "does not hold"
    assert found(runs_of(changed(LIVE_B, accuracy=0.95), last={LIVE_B: 0.5}))["c-live"].verdict == "holds"


def test_a_difference_is_told_with_its_sign() -> None:
    findings = found(runs_of(FIGURES))
    assert f"{LIVE_A}: 0.200 ± 0.000" in findings["a"].answer
    assert f"{PAPER_A}: -0.010 ± 0.000" in findings["b"].answer
    assert f"{LIVE_B}: -0.100 ± 0.000" in findings["c-live"].answer
    assert f"{PAPER_A}: -0.010 ± 0.000" in findings["d"].answer


EXTENT = Extent(rollouts=400, rows_per_step=100, stops=STOPS)


def timed(live: float, precompute: float, training: float) -> dict[str, object]:
    once = dict(zip(PARTS, (0.0, precompute / 2, precompute / 2, training), strict=True))
    return {
        "live": dict(zip(PARTS, (0.0, live / 2, live / 2 - training, training), strict=True)),
        "lightning": {SAMPLED: once, WHOLE: {**once, "scoring": 2 * once["scoring"]}},
        "row_tokens": 10.0,
        "start_s": 10.0,
    }


@pytest.mark.parametrize(
    ("live", "precompute", "verdict", "said"),
    [
        (10.0, 1.0, "holds", "Live takes 6.931"),
        (10.0, 8.0, "does not hold", "4.0 is reached from 5.3 epochs on."),
        (3.0, 8.0, "does not hold", "No number of epochs reaches 4.0"),
    ],
)
def test_cost_counts_precompute_once_and_says_what_it_takes(
    live: float, precompute: float, verdict: str, said: str
) -> None:
    finding = cost([timed(live, precompute, 1.0)] * 2, runs_of(FIGURES), EXTENT)
    assert finding.verdict == verdict
    assert said in f"{finding.answer} {finding.would_hold}"
    rows = {row.name: row.figures for row in finding.rows}
    for way, scored in ((SAMPLED, precompute), (WHOLE, 1.5 * precompute)):
        often = rows[f"{way}, 30 epochs"]["ratio"]
        assert isinstance(often, Mean) and often.mean == pytest.approx(live / (scored / 30 + 1.0))


def test_the_way_to_equal_accuracy_is_that_of_the_steps_it_took() -> None:
    rows = {row.name: row.figures for row in cost([timed(10, 1, 1)] * 2, runs_of(FIGURES), EXTENT).rows}
    live, importance, full = (rows[f"{name}, 60 steps"] for name in (LIVE_A, IMPORTANCE_A, FULL_A))
    seconds = {"live": 600_000, "importance": 4_000 + 60_000, "full": 6_000 + 60_000}
    for figures, wanted in zip((live, importance, full), seconds.values(), strict=True):
        assert isinstance(figures["equal"], Mean) and figures["equal"].mean == pytest.approx(wanted)
    assert isinstance(full["ratio"], Mean) and full["ratio"].mean == pytest.approx(600 / 66)
    assert rows[PAPER_A]["equal"] == "not in 120 steps"
