"""Rows that an engine will not take, though it lives on: they are rejected at once, and hold up nothing beside them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.dataset import open_dataset
from precompute.engine.requests import GenerateRequest
from precompute.fleet.suspects import GUILTY
from precompute.generate import seed_of
from tests.precompute.commands import ROOT, run_words
from tests.precompute.fleet import stage
from tests.precompute.fleet.puppet import REFUSAL, SCRIPT, completion, met
from tests.precompute.fleet.test_supervisor import finish

pytestmark = pytest.mark.slow


def test_rows_that_an_engine_will_not_take_are_rejected_with_its_reason_and_no_engine_dies(tmp_path: Path) -> None:
    stage.prepare(tmp_path)
    refused = [*(f"p{prompt:03d}/{sample}" for prompt in (4, 5) for sample in range(3)), "p011/2"]  # a shard, and one
    code, said = finish(tmp_path, "fleet.max_rejected=0.1", refused=refused)
    assert code == 0, said
    assert stage.faults(tmp_path) == []
    assert stage.rejected_of(tmp_path) == dict.fromkeys(refused, REFUSAL)
    assert f"row p011/2 is rejected: {REFUSAL}" in said and "7 rejected" in said and "died" not in said


def test_a_row_that_is_refused_does_not_hide_the_one_beside_it_that_engines_die_of(tmp_path: Path) -> None:
    stage.prepare(tmp_path)
    settings = ("limit=1", "fleet.max_rejected=1", "fleet.max_deaths=6")
    code, said = finish(tmp_path, *settings, refused=["p000/0"], poison=["p000/1"])
    assert code == 0, said
    assert [row.uid for row in stage.rows_of(open_dataset(str(tmp_path / "dataset")))] == ["p000/2"]
    rejected = stage.rejected_of(tmp_path)
    assert sorted(rejected) == ["p000/0", "p000/1"]
    assert rejected["p000/0"] == REFUSAL and "engines died of it" in rejected["p000/1"]
    assert said.count("replica 0 died") == GUILTY


def test_an_engine_that_takes_nothing_is_heard_of_before_all_shards_are_asked_for(tmp_path: Path) -> None:
    stage.prepare(tmp_path)
    refused = [f"p{prompt:03d}/{sample}" for prompt in range(stage.PROMPTS) for sample in range(stage.SAMPLES)]
    code, said = finish(tmp_path, "fleet.max_rejected=0", refused=refused)
    assert code == 65, said
    assert "1 row is rejected, and fleet.max_rejected = 0" in said
    assert met(tmp_path) <= 2 * stage.PER_SHARD * stage.SAMPLES, "one shard, and the next that is asked for ahead"


def test_rows_that_the_self_test_asks_for_again_and_again_are_rejected_once(tmp_path: Path) -> None:
    stage.prepare(tmp_path)
    rows = [(f"p{prompt:03d}", sample) for prompt in range(stage.PER_SHARD) for sample in range(stage.SAMPLES)]
    lengths = {f"{prompt}/{sample}": _length(prompt, sample) for prompt, sample in rows}
    *refused, left = sorted(lengths, key=lambda uid: lengths[uid])  # the shortest are tested: none is left of them
    (tmp_path / "script.json").write_text(json.dumps({"refused_scores": refused}))
    settings = [f"rollouts.limit={stage.PER_SHARD}", f"rollouts.prompts_per_shard={stage.PER_SHARD}"]
    settings += [f"rollouts.sampling.samples={stage.SAMPLES}", "score.fleet.max_rejected=1"]
    words = run_words(
        tmp_path / "model", tmp_path / "prompts.jsonl", str(tmp_path / "cache"), "--max-tokens", "32",
        "--teacher", str(tmp_path / "model"), "--allow-teacher-mismatch",
        *(word for setting in settings for word in ("--set", setting)),
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.precompute.fleet.command", "precompute", *words],
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LOPD_CACHE_DIR": str(tmp_path),
            SCRIPT: str(tmp_path / "script.json"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scored = open_dataset(str(tmp_path / "cache" / "scored"))
    assert [row.uid for row in stage.rows_of(scored)] == [left]
    assert {row.uid: row.reason for row in scored.shards[0].rejected} == dict.fromkeys(refused, REFUSAL)
    assert all(done.stderr.count(f"row {uid} is rejected") == 1 for uid in refused)
    assert "self_test" not in scored.shards[0].stats, "a noise of 0 would be a claim"


def _length(prompt: str, sample: int) -> int:
    return len(completion(GenerateRequest(None, [], seed_of(0, prompt, sample), "")).completion_ids)
