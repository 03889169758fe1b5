"""Rollouts, tables and plans made up for the tests of `common`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.dataset_writer import create_dataset
from common.schema import SCHEMA_VERSION, Rollout, to_table

VOCAB = 100
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
LOGPROB = st.floats(-1e4, 0, width=32)
IDENTITY = {
    "name": "org/model",
    "revision": None,
    "weights_sha256": "a" * 64,
    "tensors_sha256": "9" * 64,
    "config_sha256": "d" * 64,
    "tokenizer_sha256": "b" * 64,
    "chat_template_sha256": None,
}


def make_row(index: int = 0, tokens: int = 5, topk: int = 0, scored: bool = True, **changes: Any) -> Rollout:
    """A valid row with values that depend on `index` alone."""
    random = np.random.default_rng(index)
    values: dict[str, Any] = {
        "uid": f"p{index}/0",
        "prompt_id": f"p{index}",
        "sample_idx": 0,
        "prompt_ids": random.integers(0, VOCAB, 3 + index % 4).astype(np.int32),
        "completion_ids": random.integers(0, VOCAB, tokens).astype(np.int32),
        "rollout_logprobs": -random.random(tokens).astype(np.float32),
        "teacher_logprobs": -random.random(tokens).astype(np.float32) if scored else None,
        "topk_ids": random.integers(0, VOCAB, (tokens, topk)).astype(np.int32) if topk else None,
        "topk_logprobs": -random.random((tokens, topk)).astype(np.float32) if topk else None,
        "prompt": f"What is {index}?",
        "completion": "Ünïcödé 漢字 🙂",
        "meta": '{"answer": 1}',
    }
    return Rollout(**(values | changes))


def make_table(rows: int = 4, first: int = 0, topk: int = 0, scored: bool = True, **changes: Any) -> pa.Table:
    """A valid table of `rows` rows; `changes` go into its second row."""
    made = [make_row(first + index, tokens=3 + index, topk=topk, scored=scored) for index in range(rows)]
    if changes:
        made[1] = make_row(first + 1, **({"tokens": 4, "topk": topk, "scored": scored} | changes))
    return to_table(made, topk)


def make_plan(shards: int = 3, *, kind: str = "scored", topk: int = 0, **changes: Any) -> dict[str, Any]:
    """A plan as `precompute` makes them."""
    plan = {
        "kind": kind,
        "schema_version": SCHEMA_VERSION,
        "created": {"owner": "ann", "at": "2026-01-02T03:04:05+00:00", "by": "lightning-opd 0.1.0"},
        "shards": shards,
        "prompts_per_shard": 2,
        "vocab_size": VOCAB,
        "topk": topk,
        "policy": IDENTITY,
        "lineage": None,
        "teacher": IDENTITY if kind == "scored" else None,
        "sampling": {"temperature": 1.0, "max_tokens": 8, "seed": 0, "stop_ids": [2]},
        "template": {"mode": "chat", "system": None, "arguments": {}},
        "chat_template": None,
        "prompts": {"source": "prompts.jsonl", "sha256": "c" * 64, "count": 6},
        "parent": None,
        "overrides": [],
    }
    return plan | changes


def make_shard(shard: int, *, topk: int = 0, rows: int = 3) -> pa.Table:
    """The table of one shard, other rows for every shard."""
    return make_table(rows=rows, first=10 * shard, topk=topk)


def make_dataset(url: str, shards: int = 3, first: int = 0, **changes: Any) -> str:
    """A finished dataset at `url`, which comes back; its shards are those of `make_shard` from `first` on."""
    plan = make_plan(shards, **changes)
    writer = create_dataset(url, plan)
    for shard in writer.pending():
        writer.commit(shard, make_shard(first + shard, topk=plan["topk"]), {"mean_length": 4.0})
    writer.finalize()
    return url


@st.composite
def rollouts(draw: st.DrawFn, uid: str, topk: int, scored: bool) -> Rollout:
    """Any row that keeps the contract."""
    tokens = draw(st.integers(1, 40))
    ids = arrays.from_dtype(np.dtype(np.int32), min_value=0, max_value=VOCAB - 1)

    def logprobs(*shape: int) -> np.ndarray:
        return draw(arrays.arrays(np.float32, shape, elements=LOGPROB))

    return Rollout(
        uid=uid,
        prompt_id=draw(TEXT),
        sample_idx=draw(st.integers(0, 2**31 - 1)),
        prompt_ids=draw(arrays.arrays(np.int32, draw(st.integers(1, 40)), elements=ids)),
        completion_ids=draw(arrays.arrays(np.int32, tokens, elements=ids)),
        rollout_logprobs=logprobs(tokens),
        teacher_logprobs=logprobs(tokens) if scored else None,
        topk_ids=draw(arrays.arrays(np.int32, (tokens, topk), elements=ids)) if topk else None,
        topk_logprobs=logprobs(tokens, topk) if topk else None,
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        prompt=draw(TEXT),
        completion=draw(TEXT),
        meta=draw(TEXT),
    )


@st.composite
def row_lists(draw: st.DrawFn) -> tuple[list[Rollout], int, bool]:
    """Some rows, their top-k and whether they are scored."""
    scored = draw(st.booleans())
    topk = draw(st.sampled_from([0, 1, 3])) if scored else 0
    count = draw(st.integers(1, 6))
    return [draw(rollouts(f"row-{index}", topk, scored)) for index in range(count)], topk, scored


def same_rows(ours: Sequence[Rollout], theirs: Sequence[Rollout]) -> bool:
    """Equal in every value, bit for bit."""
    return len(ours) == len(theirs) and all(
        _same(getattr(one, name), getattr(other, name))
        for one, other in zip(ours, theirs, strict=True)
        for name in Rollout.__dataclass_fields__
    )


def _same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    return one == other
