"""Rollouts and datasets made of numbers, for the tests that need no network."""

from pathlib import Path
from typing import Any

import numpy as np

from common.dataset_writer import DatasetWriter, create_dataset
from common.schema import Rollout
from tests.common.rows import make_plan

VOCAB = 320


def make_rollout(uid: str, tokens: int = 40, seed: int = 0, highest: int = VOCAB) -> Rollout:
    """A rollout with random ids below `highest` and random log-probs, not graded."""
    generator = np.random.default_rng([seed, *uid.encode()])
    return Rollout(
        uid=uid,
        prompt_id=uid.partition("/")[0],
        sample_idx=0,
        prompt_ids=generator.integers(0, highest, 5, np.int32),
        completion_ids=generator.integers(0, highest, tokens, np.int32),
        rollout_logprobs=-generator.exponential(2.0, tokens).astype(np.float32),
        finish_reason="length",
    )


def make_writer(folder: Path, kind: str, shards: int = 1, **plan: Any) -> DatasetWriter:
    """The writer of a new dataset, with the least of a plan."""
    least = make_plan(
        shards,
        kind=kind,
        vocab_size=VOCAB,
        prompts_per_shard=1,
        teacher=None,
        sampling={"max_tokens": 40, "samples": 1, "temperature": 1.0, "stop_ids": [1]},
        prompts={"sha256": "0" * 64, "count": shards},
    )
    return create_dataset(str(folder), {**least, **plan})
