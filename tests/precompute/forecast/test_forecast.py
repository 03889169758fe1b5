"""`lopd precompute plan`: checks, a pilot through real engines, and what is told of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from common import cli
from precompute.forecast.estimate import Advice, PhaseEstimate, Range
from precompute.forecast.forecast import Forecast, PilotFacts
from precompute.forecast.text import explanation, show
from tests.precompute import tiny
from tests.precompute.commands import finish, refused, run_words
from tests.precompute.conftest import Models


def _words(models: Models, prompts: Path, cache: Path, *more: str) -> list[str]:
    words = run_words(models.student, prompts, str(cache), "--samples", "2", "--max-tokens", "24", *more)
    return ["plan", *words[1:]]


def _between(range_: dict[str, float] | None) -> bool:
    return range_ is not None and 0 < range_["low"] <= range_["high"]


@pytest.mark.slow
def test_a_pilot_foretells_both_phases_and_leaves_nothing(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, scratch = tiny.write_prompts(tmp_path / "prompts.jsonl", 30), tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    done = finish(*_words(models, prompts, tmp_path / "cache", "--pilot", "3", "--price-per-hour", "2", "--json"))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["pilot"]["prompts"] == 3 and told["pilot"]["rows"] == 6
    assert 1 <= told["pilot"]["mean_tokens"] <= 24 and 0 <= told["pilot"]["truncated"] <= 1
    assert [phase["phase"] for phase in told["phases"]] == ["rollouts", "score"]
    for phase in told["phases"]:
        assert (phase["rows"], phase["shards"]) == (60, 1)
        assert all(_between(phase[key]) for key in ("tokens", "stored", "hours", "cost", "rate"))
        assert phase["tokens"]["high"] <= 60 * 24 and phase["gpu_hours"] is None
        assert phase["cost"]["low"] == pytest.approx(2 * phase["hours"]["low"])
        assert phase["hours"]["low"] > phase["startup_h"] > 0
    assert 1 <= told["advice"]["prompts_per_shard"] <= 30
    assert not (tmp_path / "cache").exists() and not [*scratch.glob("lopd-pilot-*")]


def test_without_a_pilot_nothing_is_started_or_written(
    models: Models, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = _words(models, prompts, tmp_path / "cache", "--pilot", "0", "--json")
    cli.group.main(args=["precompute", *words], standalone_mode=False)
    captured = capfd.readouterr()
    told: dict[str, Any] = json.loads(captured.out)
    assert told["pilot"] is None and told["advice"] is None
    assert told["phases"][0]["tokens"] == {"low": 8, "high": 8 * 24}
    assert told["phases"][0]["hours"] is None
    assert f"preflight: {len(told['checks'])} checks ok\n" in captured.err and "teacher: ok" not in captured.err
    assert told["checks"][0].startswith("prompts: ok, 4")
    assert not (tmp_path / "cache").exists()


def test_what_run_refuses_plan_refuses(
    models: Models, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = _words(models, prompts, tmp_path / "cache", "--teacher", str(models.other_teacher))
    code, error = refused(capfd, *words)
    assert code == 65 and "teacher consistency" in error


def _forecast(fills: float) -> Forecast:
    phases = [
        PhaseEstimate(
            phase=name, shards=16, rows=2000, tokens=Range(low=1e6, high=2e6), stored=Range(low=8e6, high=16e6),
            startup_h=0.02, hours=Range(low=1, high=2.5), gpu_hours=Range(low=8, high=20), cost=Range(low=10, high=25),
            rate=None,
        )
        for name in ("rollouts", "score")
    ]  # fmt: skip
    facts = PilotFacts(prompts=16, rows=32, mean_tokens=750, truncated=0.25, fills=fills)
    advice = Advice(prompts_per_shard=100, seconds=450, stored=5e7, reason="5 to 10 minutes a shard")
    return Forecast(checks=(), pilot=facts, phases=tuple(phases), advice=advice, prompts_per_shard=64)


def test_people_get_a_table_with_the_sum_of_both_phases(capsys: pytest.CaptureFixture[str]) -> None:
    show(_forecast(1.0))
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "1,000,000 to 2,000,000" in rows["rollouts"] and "1m12s" in rows["score"]
    assert all(each in rows["together"] for each in ("16.0 MB to 32.0 MB", "2.00 to 5.00", "16.00 to 40.00", "20.00"))


def test_what_a_pilot_cannot_tell_is_told() -> None:
    assert any("25% cut off" in line for line in explanation(_forecast(1.0)))
    advice = "prompts_per_shard=100 (now 64): a shard of 7m30s and 50.0 MB"
    assert any(advice in line for line in explanation(_forecast(1.0)))
    assert not any("faster" in line for line in explanation(_forecast(1.0)))
    small = explanation(_forecast(0.125))
    assert any("to 12% of engine.max_num_seqs" in line and "--pilot 128" in line for line in small)
