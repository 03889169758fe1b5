"""The study's report: nothing is lost in JSON, agreement is found and denied, and people read what was found."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.study.results.files import agreement, headline, read, write
from benchmarks.study.results.findings import Curve, Finding, Plot, Row, Study
from benchmarks.study.results.statistics import Mean
from common.errors import DataError

CLAIM = Finding(
    key="a",
    title="Distillation improves on SFT",
    question="Is a student nearer its teacher after distillation than after SFT alone, and is it right more often?",
    columns={"accuracy": "accuracy", "kl": "reverse KL, nats", "tokens": "tokens", "note": "how it ended"},
    rows=(
        Row("SFT | alone", {"accuracy": Mean.of([0.60, 0.61, 0.62]), "kl": Mean.of([0.3001, 0.3002, 0.3004])}),
        Row("Lightning", {"accuracy": Mean.of([0.66, 0.68, 0.70]), "tokens": 123456, "note": "spent at step 90"}),
    ),
    verdict="holds",
    answer="It is right 0.07 more often. With 2. in the text the line stays a sentence.",
    seeds=(0, 1, 2),
    plots=(
        Plot(
            "Accuracy",
            "step",
            "share right",
            (Curve("Lightning", ((0, Mean.of([0.6, 0.61, 0.62])), (60.0, Mean.of([0.66, 0.68, 0.7])))),),
        ),
    ),
)
OPEN = Finding(
    key="objectives",
    title="Objectives side by side",
    question="Which objective does best?",
    columns={"accuracy": "accuracy"},
    rows=(Row("paper", {"accuracy": Mean.of([0.5, 0.52])}), Row("topk", {"accuracy": 0.61})),
    verdict="measured",
    answer="None is told apart.",
    seeds=(0, 1),
)
STUDY = Study({"command": "make study", "sizes": {"rows": 256, "stops": [60, 120]}}, (CLAIM, OPEN))


def with_row(study: Study, row: Row) -> Study:
    """The study with the first finding's last row replaced."""
    first, *others = study.findings
    return replace(study, findings=(replace(first, rows=(*first.rows[:-1], row)), *others))


def test_what_is_written_is_read_back_to_the_last_digit(tmp_path: Path) -> None:
    write(STUDY, tmp_path)
    assert read(tmp_path) == STUDY
    row = read(tmp_path).findings[0].rows[1]
    assert isinstance(row.figures["tokens"], int)


def test_the_same_study_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        write(STUDY, tmp_path / folder)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


def test_columns_keep_their_order(tmp_path: Path) -> None:
    write(STUDY, tmp_path)
    assert list(read(tmp_path).findings[0].columns) == list(CLAIM.columns)


def test_a_study_agrees_with_itself() -> None:
    assert agreement(STUDY, STUDY, {}) == []


def test_a_mean_that_left_its_interval_is_named() -> None:
    moved = with_row(STUDY, Row("Lightning", {"accuracy": Mean.of([0.30, 0.31, 0.32]), "tokens": 1, "note": "other"}))
    (line,) = agreement(moved, STUDY, {"kl": 1.0})
    assert line.startswith("a / Lightning / accuracy: 0.310") and "0.680" in line


def test_rows_that_only_one_study_has_are_no_disagreement() -> None:
    renamed = with_row(STUDY, Row("another arm", {"accuracy": Mean.of([0.30, 0.31, 0.32])}))
    assert agreement(renamed, STUDY, {}) == []


def test_studies_without_a_common_mean_do_not_agree_by_default() -> None:
    (line,) = agreement(replace(STUDY, findings=(OPEN,)), replace(STUDY, findings=(CLAIM,)), {})
    assert "nothing to compare" in line


@pytest.mark.parametrize("figure", [Mean(float("nan"), 0.1, (0.1, 0.2)), float("inf"), Mean.of([0.1, float("inf")])])
def test_a_figure_that_is_not_finite_is_refused_by_its_place(figure: Mean | float, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a / Lightning / accuracy"):
        write(with_row(STUDY, Row("Lightning", {"accuracy": figure})), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_figure_without_a_column_is_in_the_json_alone(tmp_path: Path) -> None:
    write(with_row(STUDY, Row("Lightning", {"drift": 0.4321})), tmp_path)
    assert read(tmp_path).findings[0].rows[1].figures == {"drift": 0.4321}
    assert "0.432" not in (tmp_path / "study.md").read_text()


def test_two_rows_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="SFT | alone"):
        write(with_row(STUDY, CLAIM.rows[0]), tmp_path)


def test_the_headline_has_claims_alone_and_each_with_the_first_sentence_of_its_answer() -> None:
    table = headline(STUDY)
    assert len(table.splitlines()) == 3
    assert "[Distillation improves on SFT](docs/study.md#finding-a)" in table
    assert "| holds" in table and "It is right 0.07 more often. |" in table


def test_the_text_shows_every_figure_with_the_digits_of_its_interval(tmp_path: Path) -> None:
    write(STUDY, tmp_path)
    text = (tmp_path / "study.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| SFT")]
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    assert cells == [r"SFT \| alone", "0.610 ± 0.025", "0.30023 ± 0.00038", "–", "–"]
    assert "123,456" in text and "**The claim holds.**" in text and "Seeds: 0, 1, 2." in text
    assert "- sizes.stops: `60; 120`" in text


def test_the_text_fits_120_columns_and_no_line_turns_into_a_list(tmp_path: Path) -> None:
    words = " ".join(f"{index}. - + word" for index in range(200))
    write(replace(STUDY, findings=(replace(CLAIM, answer=words), OPEN)), tmp_path)
    section = (tmp_path / "study.md").read_text().split("**The claim holds.**")[1].split("Seeds:")[0]
    lines = section.splitlines()
    assert max(map(len, lines)) <= 121  # a backslash may come on top
    assert len(lines) > 10
    assert not [line for line in lines[1:] if re.match(r"([-+*>#]|\d+[.)])(\s|$)", line)]


def test_the_page_holds_every_finding_and_needs_nothing_else(tmp_path: Path) -> None:
    write(STUDY, tmp_path)
    page = (tmp_path / "study.html").read_text()
    for finding in STUDY.findings:
        assert finding.title in page and finding.question in page and finding.answer in page
    assert page.count("<svg") == 3  # the curves, and the intervals of either finding
    assert not re.search(r"<script|<link|(src|href)=\"http", page)
