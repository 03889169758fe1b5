import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from common.schema import Rollout
from tests.trainer import build
from trainer import parity
from trainer.config import OpdConfig
from trainer.loop import train

LIMITS = {"mean": 0.1, "k3": 0.01}


def logprobs(rows: int = 6, tokens: int = 20) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [-generator.exponential(1.0, tokens).astype(np.float32) for _ in range(rows)]


def shifted(values: np.ndarray) -> np.ndarray:
    return np.roll(values, 1)


def test_equal_columns_pass_and_noise_of_bfloat16_does():
    columns = logprobs()
    noise = np.random.default_rng(1)
    noisy = [column + noise.normal(0, 0.04, len(column)).astype(np.float32) for column in columns]
    assert parity.compare(columns, columns).mean == 0
    assert parity.fault(parity.compare(noisy, columns), **LIMITS) is None


def test_a_shift_is_named_although_its_mean_is_right():
    columns = logprobs()
    found = parity.compare(columns, [shifted(column) for column in columns])
    assert abs(np.concatenate(columns).mean() - np.concatenate([shifted(c) for c in columns]).mean()) < 1e-6
    assert "one token later" in (parity.fault(found, mean=99, k3=99) or "")


def test_another_temperature_is_over_the_limits():
    columns = logprobs()
    assert parity.fault(parity.compare([1.2 * column for column in columns], columns), **LIMITS)


@pytest.mark.parametrize(
    ("setting", "word"), [({"temperature": 0}, "greedy"), ({"top_p": 0.9}, "top_p=0.9"), ({"top_k": 20}, "top_k=20")]
)
def test_sampling_that_is_not_the_policys_own_is_named(setting, word):
    whole = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    assert parity.cut_short(whole) is None
    assert word in (parity.cut_short({**whole, **setting}) or "")


def opd(example, tmp_path, rows: list[Rollout], **settings) -> OpdConfig:
    data = build.make_dataset(tmp_path / "data", rows, kind="scored", policy=example.student, teacher=example.teacher)
    common = {"compute": "float32", "rows_per_step": 12, "token_budget": 90, "max_steps": 1, "parity_rows": 12}
    return OpdConfig(model=str(example.student), data=data, output=str(tmp_path / "out"), **{**common, **settings})


def test_rollout_logprobs_shifted_by_one_token_are_refused(example, alone, tmp_path):
    rows = [replace(row, rollout_logprobs=shifted(row.rollout_logprobs)) for row in example.rows]
    with pytest.raises(DataError, match=r"does not give its own rollout log-probs back.*one token"):
        train(opd(example, tmp_path, rows), alone, lambda line: None)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_teacher_logprobs_shifted_by_one_token_are_refused(example, alone, tmp_path):
    rows = [replace(row, teacher_logprobs=shifted(row.teacher_logprobs)) for row in example.rows]
    with pytest.raises(DataError, match="not aligned"):
        train(opd(example, tmp_path, rows), alone, lambda line: None)


def test_report_says_so_and_goes_on_and_the_export_says_so_too(example, alone, tmp_path):
    rows = [replace(row, rollout_logprobs=np.minimum(row.rollout_logprobs - 0.5, 0)) for row in example.rows]
    said: list[str] = []
    config = opd(example, tmp_path, rows, parity="report")
    train(config, alone, said.append)
    assert any("going on because parity=report" in line for line in said)
    (step,) = build.read_metrics(tmp_path / "out")
    assert step["overrides"] == ["parity"] == stamped(tmp_path)
    train(config, alone, said.append)
    assert said[-1].startswith("already finished")
    shutil.rmtree(tmp_path / "out" / "export")
    train(config, alone, said.append)
    assert stamped(tmp_path) == ["parity"], "also by a run that only resumed"


def stamped(folder: Path) -> list[str]:
    return json.loads((folder / "out" / "export" / "provenance.json").read_text())["overrides"]


def test_bfloat16_passes_the_gate_of_float32_rollouts(example, alone, tmp_path):
    said: list[str] = []
    train(opd(example, tmp_path, example.rows, compute="bfloat16", objective="importance"), alone, said.append)
    assert any("parity: mean |d| 0.0" in line for line in said)
    assert build.read_metrics(tmp_path / "out")[0]["loss"] < 0


def test_a_student_that_is_its_teacher_has_no_advantage(example, alone, tmp_path):
    twin = build.make_student(tmp_path / "twin", example.teacher, noise=0.0)
    rows = build.graded(build.open_model(twin), build.sample(build.open_model(twin), prompts=6))
    data = build.make_dataset(tmp_path / "data", rows, kind="scored", policy=twin, teacher=example.teacher)
    settings = {"compute": "float32", "rows_per_step": 12, "token_budget": 90}
    train(OpdConfig(model=str(twin), data=data, output=str(tmp_path / "out"), **settings), alone, lambda line: None)
    (first,) = build.read_metrics(tmp_path / "out")
    assert abs(first["kl/teacher_k1"]) < 1e-5 and first["advantage/std"] < 1e-5
