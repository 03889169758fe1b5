"""The committed study: its texts are those of its numbers."""

from pathlib import Path

from benchmarks.study.__main__ import BEYOND_SEEDS, DOCS, SEEDS
from benchmarks.study.results.files import headline, read, write

ROOT = Path(__file__).parents[3]


def test_the_pages_say_what_the_numbers_are(tmp_path: Path) -> None:
    study = read(DOCS)
    write(study, tmp_path)
    assert (tmp_path / "study.md").read_text() == (DOCS / "study.md").read_text()
    assert (tmp_path / "study.json").read_text() == (DOCS / "study.json").read_text()
    assert headline(study) in (ROOT / "README.md").read_text()


def test_every_finding_has_the_seeds_that_were_asked_for() -> None:
    seeds = {finding.key: len(finding.seeds) for finding in read(DOCS).findings}
    assert {seeds[key] for key in ("a", "b", "c-live", "c-offline", "d", "full-support")} == {SEEDS}
    assert {seeds[key] for key in ("objectives", "staleness", "rounds", "truncation", "temperature")} == {BEYOND_SEEDS}
