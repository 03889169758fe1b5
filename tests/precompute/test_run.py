"""Both phases as a user runs them, with real engines: killed, resumed, repeated, and onto S3."""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from common.dataset import Dataset, open_dataset
from common.lineage import identify
from common.schema import Rollout, to_rows
from tests.precompute import tiny
from tests.precompute.commands import finish, run_words, start
from tests.precompute.conftest import Models

pytestmark = pytest.mark.slow

PROMPTS, SAMPLES, MAX_TOKENS, TOPK = 16, 2, 64, 3
SETTINGS = (
    "--samples", str(SAMPLES), "--max-tokens", str(MAX_TOKENS), "--topk", str(TOPK),
    "--set", "rollouts.prompts_per_shard=1",
)  # fmt: skip
ONE_AT_A_TIME = ("dtype=float32", "max_num_seqs=1", "cpu_kv_gib=0.1")


@dataclass(frozen=True)
class Story:
    """A run that was killed in the middle of its rollouts and started again."""

    words: list[str]
    cache: Path
    left_behind: dict[str, bytes]  # the commits that the killed run had made
    second: CompletedProcess[str]


@pytest.fixture(scope="module")
def story(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Story:
    root = tmp_path_factory.mktemp("run")
    prompts, cache = tiny.write_prompts(root / "prompts.jsonl", PROMPTS), root / "cache"
    first = start(*run_words(models.student, prompts, str(cache), *SETTINGS, engine=ONE_AT_A_TIME))
    try:
        _await_commit(cache / "rollouts/commits", first)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    left_behind = {file.name: file.read_bytes() for file in (cache / "rollouts/commits").glob("*.json")}
    words = run_words(models.student, prompts, str(cache), *SETTINGS)  # how the box runs it may change on resume
    return Story(words, cache, left_behind, finish(*words))


def _await_commit(commits: Path, process: object, patience_s: float = 180) -> None:
    deadline = time.monotonic() + patience_s
    while not any(commits.glob("*.json")):
        assert process.poll() is None, process.communicate()  # type: ignore[attr-defined]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _rows(dataset: Dataset) -> list[Rollout]:
    return [row for shard in range(dataset.num_shards) for row in to_rows(dataset.read_shard(shard))]


def test_a_killed_run_keeps_what_it_had_committed(story: Story) -> None:
    assert 1 <= len(story.left_behind) < PROMPTS
    commits = story.cache / "rollouts/commits"
    assert all((commits / name).read_bytes() == data for name, data in story.left_behind.items())


def test_the_same_command_resumes_and_finishes_both_datasets(story: Story) -> None:
    assert story.second.returncode == 0, story.second.stderr
    statuses = [json.loads(file.read_text()) for file in (story.cache / "rollouts/status").glob("*.json")]
    [second] = [status for status in statuses if status["state"] == "complete"]
    assert second["shards_here"] == PROMPTS - len(story.left_behind)
    assert story.second.stdout.count(": complete, 32 rows") == 2


@pytest.mark.parametrize("name", ["rollouts", "scored"])
def test_every_sample_is_there_exactly_once_and_in_order(story: Story, name: str) -> None:
    rows = _rows(open_dataset(str(story.cache / name)))
    assert [(row.prompt_id, row.sample_idx) for row in rows] == [
        (f"p{prompt:03d}", sample) for prompt in range(PROMPTS) for sample in range(SAMPLES)
    ]
    assert all(json.loads(row.meta)["answer"] == str(int(row.prompt_id[1:])) for row in rows)


def test_scores_are_those_of_the_teacher_in_the_lineage(story: Story, models: Models) -> None:
    dataset = open_dataset(str(story.cache / "scored"))
    assert dataset.plan["teacher"] == identify(models.teacher, str(models.teacher)).model_dump()
    assert dataset.plan["parent"] == open_dataset(str(story.cache / "rollouts")).manifest_sha256
    assert (dataset.plan["overrides"], dataset.topk) == ([], TOPK)
    teacher = LlamaForCausalLM.from_pretrained(models.teacher, dtype=torch.float32).eval()
    for row in _rows(dataset)[::5]:
        assert row.teacher_logprobs is not None
        assert np.abs(row.teacher_logprobs - _logprobs(teacher, row)).max() <= 2e-3


def test_rollout_logprobs_are_those_of_the_student(story: Story, models: Models) -> None:
    student = LlamaForCausalLM.from_pretrained(models.student, dtype=torch.float32).eval()
    for row in _rows(open_dataset(str(story.cache / "rollouts")))[::5]:
        assert np.abs(row.rollout_logprobs - _logprobs(student, row)).max() <= 2e-3


def test_a_finished_run_starts_no_engine_again(story: Story) -> None:
    again = finish(*story.words)
    assert again.returncode == 0
    assert again.stdout.count("already complete, 32 rows") == 2
    assert again.stderr == ""


def test_a_run_onto_s3_with_an_allowed_mismatch_is_stamped_everywhere(models: Models, s3: str, prompts: Path) -> None:
    mismatch = ["--teacher", str(models.other_teacher), "--allow-teacher-mismatch"]
    done = finish(*run_words(models.student, prompts, s3, "--max-tokens", "24", *mismatch))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if ": complete" in line] == [
        f"{s3}/rollouts: complete, 4 rows, {open_dataset(f'{s3}/rollouts').num_tokens} completion tokens",
        f"{s3}/scored: complete, 4 rows, {open_dataset(f'{s3}/scored').num_tokens} completion tokens",
    ]
    scored = open_dataset(f"{s3}/scored")
    assert "warning: overridden checks: teacher-mismatch" in done.stderr
    assert scored.plan["overrides"] == ["teacher-mismatch"]
    assert scored.manifest["overrides"] == ("teacher-mismatch",)
    assert "teacher-mismatch" in scored.store.get("README.md").decode()
    assert all(row.teacher_logprobs is not None for row in _rows(scored))
    secrets = [entry.name for entry in scored.store.list() if b"canary" in scored.store.get(entry.name)]
    assert (secrets, "canary" in done.stderr) == ([], False)


@torch.no_grad()
def _logprobs(network: LlamaForCausalLM, row: Rollout) -> np.ndarray:
    ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.completion_ids]).astype(np.int64))
    table = network(ids[None], use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
    return table.gather(-1, ids[len(row.prompt_ids) :, None])[:, 0].numpy()
