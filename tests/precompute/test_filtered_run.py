"""Answers of a teacher at another temperature, filtered and verified; and rollouts with holes, scored. Real engines."""

import json
from pathlib import Path

import pytest

from common.cache.verify import verify
from common.dataset import open_dataset
from common.lineage import Provenance, identify
from common.schema import to_rows, to_table
from precompute.audit.run import Settings, audit
from tests.precompute import tiny
from tests.precompute.commands import SMALL_ENGINE, finish
from tests.precompute.conftest import Models
from tests.precompute.rows import make_rollout, make_writer

pytestmark = pytest.mark.slow
ENGINE = [word for setting in SMALL_ENGINE for word in ("--set", f"engine.{setting}")]
CHECK = '''
def right(text, meta):
    """Nothing is right of prompt 3; prompt 4 is beyond this verifier; elsewhere every short text is."""
    if meta["answer"] == "4":
        raise ValueError("beyond me")
    return meta["answer"] != "3" and "<|end|>" not in text
'''


def test_answers_are_sampled_filtered_and_verified_and_their_log_probs_are_of_what_sampled(
    models: Models, tmp_path: Path
) -> None:
    prompts, data, check = tiny.write_prompts(tmp_path / "p.jsonl", 6), tmp_path / "sft", tmp_path / "check.py"
    check.write_text(CHECK)
    filters = [f"verifier={check}:right", "keep=correct", "drop_duplicates=true", "per_prompt=3", "max_repetition=0.9"]
    done = finish(
        "sft-data", "--model", str(models.teacher), "--prompts", str(prompts), "--cache", str(data),
        "--samples", "4", "--max-tokens", "24", "--temperature", "0.8", "--top-p", "0.9", *ENGINE,
        "--set", "prompts_per_shard=1", *(word for one in filters for word in ("--set", f"filters.{one}")),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(str(data))
    rows = [to_rows(dataset.read_shard(shard)) for shard in range(6)]
    assert [len(shard) for shard in rows] == [3, 3, 3, 0, 0, 3]
    assert all(json.loads(row.meta)["verified"] is True for shard in rows for row in shard)
    failed = [commit.stats["verifier_failed"] for commit in dataset.shards]
    assert failed == [0, 0, 0, 0, dataset.shards[4].stats["judged"], 0] and failed[4] > 0
    assert dataset.plan["filters"]["verifier"]["function"] == "right"
    assert "12 of 24 (50.0%) asked for, 6 of 6 shards" in done.stdout and "found wrong" in done.stdout
    assert verify(str(data), full=True).sound
    [column] = audit(str(data), Settings(models=(str(models.teacher),), rows=12)).columns
    assert column.faults == () and column.found.largest < 2e-3 and column.found.outside == 0


def test_rollouts_of_which_a_shard_is_empty_and_rows_are_rejected_are_scored(models: Models, tmp_path: Path) -> None:
    lineage = Provenance(role="attested", teacher=identify(models.teacher, str(models.teacher)))
    policy = identify(models.student, str(models.student)).model_dump()
    writer = make_writer(
        tmp_path / "rollouts", "rollouts", shards=3, policy=policy, lineage=lineage.model_dump(mode="json")
    )
    writer.commit(0, to_table([make_rollout("a/0"), make_rollout("b/0")]), {}, {"c/0": "engine died"})
    writer.commit(1, to_table([]), {}, {"d/0": "engine died"})
    writer.commit(2, to_table([make_rollout("e/0")]))
    writer.finalize()
    done = finish("score", "--rollouts", writer.url, "--cache", str(tmp_path / "scored"), *ENGINE)
    assert done.returncode == 0, done.stderr
    scored = open_dataset(str(tmp_path / "scored"))
    assert [commit.rows for commit in scored.shards] == [2, 0, 1]
    assert [row.uid for shard in range(3) for row in to_rows(scored.read_shard(shard))] == ["a/0", "b/0", "e/0"]
    assert all(commit.rejected == () for commit in scored.shards)
