"""The V2 model runner, which a GPU has and this CPU can be brought to run: grading of given ids, exactly.

Ids and log-probs are compared with an independent Hugging Face forward pass, and the ways to grade with each other.
"""

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.precompute.conftest import Models
from tests.precompute.engine.interpreted import v2_environment
from tests.precompute.engine.v2_engine import TOPK

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # nats, float32


@pytest.fixture(scope="module")
def found(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("v2")
    environment = {**os.environ, **v2_environment(folder / "backend")}
    words = [sys.executable, "-m", "tests.precompute.engine.v2_engine", str(models.student), str(folder / "found.json")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def tables(models: Models, found: dict[str, Any]) -> list[np.ndarray]:
    """Log-probs of the whole vocabulary before each completion token, (tokens, vocab)."""
    network = LlamaForCausalLM.from_pretrained(models.student, dtype=torch.float32).eval()
    told = []
    for row in found["rollouts"]:
        ids = torch.tensor(row["prompt_ids"] + row["completion_ids"])
        with torch.no_grad():
            logits = network(ids[None], use_cache=False).logits[0, len(row["prompt_ids"]) - 1 : -1]
        told.append(logits.log_softmax(-1).numpy())
    return told


def _all(rows: list[dict[str, Any]], column: str) -> np.ndarray:
    return np.concatenate([np.asarray(row[column]) for row in rows])


def test_the_engine_is_asked_and_grades_given_ids(found: dict[str, Any]) -> None:
    assert found["scores_by_id"] is True


def test_both_ways_to_grade_give_the_same_numbers(found: dict[str, Any]) -> None:
    by_id, in_prompt = (_all(found[way], "teacher_logprobs") for way in ("by_id", "in_prompt"))
    assert len(by_id) > 30
    assert np.array_equal(by_id, in_prompt)


def test_grading_ones_own_rollouts_changes_nothing(found: dict[str, Any]) -> None:
    sampled = _all(found["rollouts"], "rollout_logprobs")
    assert np.array_equal(_all(found["by_id"], "teacher_logprobs"), sampled)


def test_rollouts_hold_the_real_top_k_of_the_policy(found: dict[str, Any], tables: list[np.ndarray]) -> None:
    for row, table in zip(found["rollouts"], tables, strict=True):
        ids = np.asarray(row["rollout_topk_ids"])
        assert ids.shape == (len(row["completion_ids"]), TOPK)
        named = np.take_along_axis(table, ids, axis=1)
        assert np.abs(named + np.sort(-table, axis=1)[:, :TOPK]).max() <= TOLERANCE


def test_the_students_top_k_is_graded_beside_the_sampled_token(found: dict[str, Any], tables: list[np.ndarray]) -> None:
    for sampled, row, table in zip(found["rollouts"], found["students_top"], tables, strict=True):
        assert row["topk_ids"] == sampled["rollout_topk_ids"]
        assert row["rollout_topk_ids"] is None
        named = np.take_along_axis(table, np.asarray(row["topk_ids"]), axis=1)
        assert np.abs(np.asarray(row["topk_logprobs"]) - named).max() <= TOLERANCE
    plain, beside = (_all(found[way], "teacher_logprobs") for way in ("by_id", "students_top"))
    assert np.array_equal(plain, beside)


def test_where_student_and_teacher_are_one_their_top_k_are(found: dict[str, Any]) -> None:
    for column in ("topk_ids", "topk_logprobs", "teacher_logprobs"):
        assert np.array_equal(_all(found["students_top"], column), _all(found["teachers_top"], column))


def test_company_in_a_batch_moves_nothing_in_float32_on_a_cpu(found: dict[str, Any]) -> None:
    assert found["noise_by_id"] == found["noise_in_prompt"] == 0.0
