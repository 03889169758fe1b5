"""What the workers write: rows known from a seed, but for a noise that every worker has of its own, as GPUs do."""

import json
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from common.schema import Rollout, arrow_schema, to_table
from tests.common.rows import make_plan

ROWS = 4
"""Rows of a shard."""
VOCAB = 1000


class Verdict(StrEnum):
    """What a table is that was read for a shard."""

    RIGHT = "right"
    """All rows, as one worker made them."""
    SHORT = "short"
    """Rows are missing."""
    TWICE = "twice"
    """A row stands there twice."""
    WRONG = "wrong"
    """It holds what no worker made for this shard."""


@dataclass(frozen=True)
class Round:
    """One dataset of the run."""

    url: str
    number: int
    shards: int
    seed: int

    def plan(self) -> dict[str, Any]:
        """The plan by which all workers make it."""
        plan = make_plan(self.shards, vocab_size=VOCAB)
        return {**plan, "sampling": {**plan["sampling"], "seed": self.number}}

    def uids(self, shard: int) -> list[str]:
        """Names of the shard's rows."""
        return [f"{self.number}-{shard}-{row}/0" for row in range(ROWS)]

    def rows(self, shard: int, tag: int) -> list[Rollout]:
        """The shard as the worker of this tag makes it; the tag stands in every row."""
        return [_row(self, uid, shard, row, tag) for row, uid in enumerate(self.uids(shard))]

    def judge(self, shard: int, table: pa.Table) -> Verdict:
        """What `table` is as the content of `shard`."""
        if not table.schema.equals(arrow_schema()) or not len(table):
            return Verdict.WRONG if len(table) else Verdict.SHORT
        rows = table.to_pylist()
        made = _made(self, shard, _tag(rows[0]["meta"]))
        if any(row != made.get(row["uid"]) for row in rows):
            return Verdict.WRONG
        if len({row["uid"] for row in rows}) < len(rows):
            return Verdict.TWICE
        return Verdict.RIGHT if len(rows) == ROWS else Verdict.SHORT


def _row(place: Round, uid: str, shard: int, row: int, tag: int) -> Rollout:
    known = np.random.default_rng([place.seed, place.number, shard, row])
    noise = np.random.default_rng([place.seed, place.number, shard, row, tag])
    tokens = int(known.integers(40, 400))
    logprobs = -known.exponential(1.0, (2, tokens))  # (rollout and teacher, tokens)
    logprobs = np.minimum(logprobs + noise.normal(0, 1e-3, logprobs.shape), 0.0).astype(np.float32)
    return Rollout(
        uid=uid,
        prompt_id=f"{place.number}-{shard}-{row}",
        sample_idx=0,
        prompt_ids=known.integers(0, VOCAB, 20).astype(np.int32),
        completion_ids=known.integers(0, VOCAB, tokens).astype(np.int32),
        rollout_logprobs=logprobs[0],
        teacher_logprobs=logprobs[1],
        meta=json.dumps({"tag": tag}),
    )


@lru_cache(maxsize=1000)
def _made(place: Round, shard: int, tag: int) -> dict[str, dict[str, Any]]:
    return {row["uid"]: row for row in to_table(place.rows(shard, tag)).to_pylist()}


def _tag(meta: str) -> int:
    """The tag in a row's meta; one that no worker has where a bit of it was altered."""
    try:
        tag = json.loads(meta)["tag"]
    except (ValueError, KeyError, TypeError):
        return 0
    return tag if isinstance(tag, int) and tag > 0 else 0
