import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from common.errors import DataError, UsageError
from common.storage import Store
from tests.trainer import build
from trainer.cli import group
from trainer.config import OpdConfig, SftConfig
from trainer.loop import train
from trainer.watch import report
from trainer.watch.curves import running_median, series
from trainer.watch.report import alarm, read_output, render, report_run, write_report

DOCUMENT = build.ROOT / "docs" / "training.md"
NAME = re.compile(r"^\| `([a-z]+(?:/\w+)?)` \|", re.MULTILINE)


def settings(example, output: Path, **changes: Any) -> dict[str, Any]:
    places = {"model": str(example.student), "data": example.scored, "output": str(output)}
    return {**places, "compute": "float32", "rows_per_step": 7, "token_budget": 90, "max_steps": 6, **changes}


@pytest.fixture
def distilled(example, alone, tmp_path) -> Path:
    """The output of a run whose rollouts were soon spent, with validation."""
    output = tmp_path / "distilled"
    run = settings(example, output, lr=3e-3, spent_k3=1e-3, validation_share=0.2, validate_every=3)
    train(OpdConfig.model_validate(run), alone, lambda line: None)
    return output


@pytest.fixture
def tuned(example, alone, tmp_path) -> Path:
    output = tmp_path / "tuned"
    run = settings(example, output, model=str(example.student), data=example.sft, validation_share=0.2, lr=1e-3)
    train(SftConfig.model_validate(run), alone, lambda line: None)
    return output


def test_every_metric_of_a_run_is_explained_and_no_other(distilled, tuned):
    """docs/training.md is the reference: one row a metric."""
    written = {name for output in (distilled, tuned) for record in build.read_metrics(output) for name in record}
    explained = NAME.findall(DOCUMENT.read_text())
    assert len(explained) == len(set(explained))
    assert set(explained) - {"overrides"} == written - {"overrides"}
    assert "overrides" in explained


def test_the_page_tells_what_the_run_was_and_how_it_went(example, distilled):
    pytest.importorskip("matplotlib")
    place = write_report([str(distilled)], str(distilled / "report.html"))
    page = Path(place).read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") >= 12, "a plot for each figure"
    for word in ("Distillation: distilled", "round 1", str(example.teacher), "ratio/ess", "max_importance_ratio"):
        assert word in page, word
    assert "the rollouts were spent from step" in page.partition("<h2>")[0], "above all else"
    linked = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?(https?://[^"\')]+)', page)
    assert [link for link in linked if "w3.org" not in link and "purl.org" not in link] == [], "nothing is fetched"


def test_several_runs_lie_side_by_side(distilled, tuned):
    pytest.importorskip("matplotlib")
    page = render([read_output(str(distilled)), read_output(str(tuned))])
    assert "<title>2 runs: distilled, tuned</title>" in page
    assert re.search(r"<td>lr</td><td>0\.003</td><td>0\.001</td>", page), "the settings that differ"
    assert "<td>token_budget</td>" not in page, "and not those that are the same"


def test_overridden_checks_are_in_the_alarm(distilled):
    run = read_output(str(distilled))
    run.steps[-1]["overrides"] = ["teacher-mismatch"]
    assert "distilled: overridden checks: teacher-mismatch." in alarm(["distilled"], [run])


def test_runs_of_one_name_are_told_apart(distilled, tmp_path):
    pytest.importorskip("matplotlib")
    other = tmp_path / "elsewhere" / "distilled"
    other.mkdir(parents=True)
    (other / "metrics.jsonl").write_bytes((distilled / "metrics.jsonl").read_bytes())
    page = render([read_output(str(distilled)), read_output(str(other))])
    assert "elsewhere/distilled" in page.partition("</h1>")[0]


def test_a_run_without_a_record_has_a_page_too(distilled):
    pytest.importorskip("matplotlib")
    (distilled / "run.json").unlink()
    assert "Training: distilled" in render([read_output(str(distilled))])


def test_the_command_writes_into_the_output_or_where_it_is_told(distilled, tmp_path):
    pytest.importorskip("matplotlib")
    said = CliRunner().invoke(group, ["report", str(distilled)])
    assert said.exit_code == 0 and said.output.strip() == str(distilled / "report.html")
    said = CliRunner().invoke(group, ["report", str(distilled), str(distilled), "--to", "memory://pages/two.html"])
    assert said.stdout.strip() == "memory://pages/two.html"
    assert b"<svg" in Store("memory://pages").get("two.html")


def test_an_output_without_metrics_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match="no metrics.jsonl, or an empty one"):
        read_output(str(tmp_path))


def test_without_matplotlib_the_way_to_the_page_is_said(distilled, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    monkeypatch.setattr("common.report.find_spec", lambda name: None)
    said: list[str] = []
    report_run(str(distilled), said.append)
    assert said == [f"for a page of curves install lightning-opd[report], then: python -m trainer report {distilled}"]
    with pytest.raises(UsageError, match=r"Install lightning-opd\[report\]"):
        write_report([str(distilled)], str(distilled / "report.html"))


def test_a_page_that_cannot_be_written_is_a_warning_at_the_end_of_a_run(distilled):
    pytest.importorskip("matplotlib")
    (distilled / "report.html").mkdir()
    said: list[str] = []
    report_run(str(distilled), said.append)
    assert len(said) == 1 and said[0].startswith("WARNING: no report could be written")


def test_a_figure_without_a_value_is_no_point():
    x, y = series([{"step": 1, "a": 1.0}, {"step": 2, "a": None}, {"step": 3}, {"step": 4, "a": 2.0}], "a")
    assert x.tolist() == [1, 4] and y.tolist() == [1.0, 2.0]


def test_the_running_median_forgets_an_outlier():
    values = np.array([1.0, 1.0, 100.0, 1.0, 1.0])
    assert running_median(values, 3).tolist() == [1.0, 1.0, 1.0, 1.0, 1.0]


def test_a_finished_run_leaves_its_page(example, tmp_path):
    pytest.importorskip("matplotlib")
    words = [f"{key}={value}" for key, value in settings(example, tmp_path, max_steps=1).items()]
    result = build.run_trainer("opd", *words)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == f"report: {tmp_path}/report.html" and (tmp_path / "report.html").exists()
    assert any(line.startswith("round 1: 24 rows") for line in result.stderr.splitlines())
