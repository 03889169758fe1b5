"""The student's top-k from the command line to the dataset, with engines that can grade it: the V2 model runner."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from common.cache.verify import verify
from common.dataset import open_dataset
from common.schema import Rollout, to_rows
from precompute.audit.run import Settings, audit
from tests.precompute.commands import ROOT, run_words
from tests.precompute.conftest import Models
from tests.precompute.engine.interpreted import v2_environment

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

STORED, GRADED = 4, 3
TOLERANCE = 1e-4  # nats, float32
SETTINGS = (
    "--samples", "2", "--max-tokens", "12", "--set", f"rollouts.topk={STORED}",
    "--topk", str(GRADED), "--set", "score.topk_support=student",
)  # fmt: skip


@pytest.fixture(scope="module")
def cache(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("student-topk")
    (root / "prompts.jsonl").write_text('{"prompt": "Count to 3."}\n{"prompt": "the dog in the fog"}\n')
    words = run_words(models.student, root / "prompts.jsonl", str(root / "cache"), *SETTINGS)
    environment = {**os.environ, **v2_environment(root / "backend")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment["PYTHONPATH"]])
    command = [sys.executable, "-m", "common.cli", "precompute", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return root / "cache"


def _rows(url: Path) -> list[Rollout]:
    dataset = open_dataset(str(url))
    return [row for shard in range(dataset.num_shards) for row in to_rows(dataset.read_shard(shard))]


def test_rollouts_hold_it_and_scores_are_of_it(cache: Path, models: Models) -> None:
    rollouts, scored = _rows(cache / "rollouts"), _rows(cache / "scored")
    assert len(rollouts) == len(scored) == 4
    teacher = LlamaForCausalLM.from_pretrained(models.teacher, dtype=torch.float32).eval()
    for own, graded in zip(rollouts, scored, strict=True):
        assert own.rollout_topk_ids is not None and own.rollout_topk_ids.shape == (len(own.completion_ids), STORED)
        assert graded.topk_ids is not None and graded.topk_logprobs is not None and graded.rollout_topk_ids is None
        assert graded.topk_ids.tolist() == own.rollout_topk_ids[:, :GRADED].tolist()
        ids = torch.from_numpy(np.concatenate([own.prompt_ids, own.completion_ids]).astype(np.int64))
        with torch.no_grad():
            table = teacher(ids[None]).logits[0, len(own.prompt_ids) - 1 : -1].log_softmax(-1).numpy()
        expected = np.take_along_axis(table, graded.topk_ids.astype(np.int64), axis=1)
        assert np.abs(graded.topk_logprobs - expected).max() <= TOLERANCE


def test_its_plan_names_the_support(cache: Path) -> None:
    plan = open_dataset(str(cache / "scored")).plan
    assert (plan["topk"], plan["topk_support"], "rollout_topk" in plan) == (GRADED, "student", False)


def test_verify_and_audit_find_nothing_wrong(cache: Path) -> None:
    for name in ("rollouts", "scored"):
        assert verify(str(cache / name), full=True).findings == ()
        assert audit(str(cache / name), Settings()).passed
