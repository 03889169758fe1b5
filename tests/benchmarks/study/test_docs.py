"""The committed study: its texts are those of its numbers."""

from pathlib import Path

from benchmarks.study.__main__ import BEYOND_SEEDS, DOCS, SEEDS
from benchmarks.study.arms import Extent
from benchmarks.study.claims import claims
from benchmarks.study.results.files import headline, read, write
from benchmarks.study.results.findings import Row, Study
from benchmarks.study.results.statistics import Mean
from benchmarks.study.runs import Runs

ROOT = Path(__file__).parents[3]
CLAIMS = ("a", "b", "c-live", "c-offline", "d", "full-support")


def test_the_pages_say_what_the_numbers_are(tmp_path: Path) -> None:
    study = read(DOCS)
    write(study, tmp_path)
    assert (tmp_path / "study.md").read_text() == (DOCS / "study.md").read_text()
    assert (tmp_path / "study.json").read_text() == (DOCS / "study.json").read_text()
    assert headline(study) in (ROOT / "README.md").read_text()


def test_the_verdicts_are_those_of_the_recorded_values() -> None:
    """Every value by seed goes through the rules of the claims once more; a verdict written by hand falls here."""
    study = read(DOCS)
    recorded = {finding.key: finding for finding in study.findings}
    found = claims(recorded_runs(study), Extent().stops, range(SEEDS))
    assert len(found) > 5
    for claim in found:
        told = recorded[claim.key]
        assert (claim.verdict, claim.answer, claim.would_hold) == (told.verdict, told.answer, told.would_hold)


def recorded_runs(study: Study) -> list[Runs]:
    """Every arm of the claims, seed by seed, out of their tables."""
    rows = {row.name: row for finding in study.findings if finding.key in CLAIMS for row in finding.rows}
    at_stop = [name.removesuffix(" steps").rpartition(", ") for name in rows if name.endswith(" steps")]
    stops = sorted({int(stop) for _, _, stop in at_stop})
    arms = {arm for arm, _, _ in at_stop}
    return [
        Runs(
            {name: figures(rows[f"teacher {name.upper()}"], seed) for name in "ab"},
            figures(rows["after SFT"], seed),
            {arm: [{"step": stop, **figures(rows[f"{arm}, {stop} steps"], seed)} for stop in stops] for arm in arms},
        )
        for seed in range(SEEDS)
    ]


def figures(row: Row, seed: int) -> dict[str, float]:
    return {key: mean.values[seed] for key, mean in row.figures.items() if isinstance(mean, Mean)}


def test_every_finding_has_the_seeds_that_were_asked_for() -> None:
    for finding in read(DOCS).findings:
        if finding.key in CLAIMS:
            assert len(finding.seeds) == SEEDS
        elif finding.key in ("e", "midsize"):
            assert len(finding.seeds) == 1
        else:
            assert len(finding.seeds) == BEYOND_SEEDS
