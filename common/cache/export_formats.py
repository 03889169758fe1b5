"""Rows in the layouts of other trainers. Pure: a table of ours in, a table of theirs out.

    trl     TRL. Answers of a teacher: `input_ids` and `labels`, which `SFTTrainer` takes as tokenised already. Scored
            rollouts: `prompt_ids`, `completion_ids` and `logprobs`, the three that a `rollout_func` returns, and
            `teacher_logprobs`, which the trainer hands on to the reward functions.
    verl    verl. The columns of its RL datasets, and `agent_loop_output`: the fields of `AgentLoopOutput`, so that an
            agent loop replays a row instead of sampling. verl has an entry of `teacher_ids` and `teacher_logprobs` at
            every token of prompt and completion, and it grades the token after; those of the prompt are 0.
    slime   The paper's own trainer: a prompt and a nested `metadata` with the completion and its grades. Its prompt is
            the exact ids, which its reader takes as they are; it would tokenise a text anew.

Ids stay ids everywhere: text tokenised again is another sequence.
"""

import json
from typing import Any

import numpy as np
import pyarrow as pa

from common.schema import topk_of

IGNORED = -100
"""The label of a token without loss, in TRL as in transformers."""
ANSWERS = ("label", "ground_truth", "answer", "solution")
"""Where a verifier's label is looked for in `meta`, in this order."""
IDS, LOGPROBS = pa.list_(pa.int32()), pa.list_(pa.float32())


def to_trl(table: pa.Table) -> pa.Table:
    """Rows for TRL; which, depends on whether they are scored."""
    named = {name: table[name] for name in ("uid", "prompt")}
    if table["teacher_logprobs"].null_count:
        input_ids = _joined(table["prompt_ids"], table["completion_ids"])
        hidden = _like(table["prompt_ids"], np.int32, IGNORED)
        labels = _joined(pa.chunked_array([hidden]), table["completion_ids"])
        return pa.table({"uid": table["uid"], "input_ids": input_ids, "labels": labels})
    kept = {name: table[name] for name in ("prompt_ids", "completion_ids", "teacher_logprobs")}
    return pa.table(named | kept | {"logprobs": table["rollout_logprobs"]}).select(
        ["uid", "prompt", "prompt_ids", "completion_ids", "logprobs", "teacher_logprobs"]
    )


def to_verl(table: pa.Table, data_source: str) -> pa.Table:
    """Scored rows for verl.

    Args:
        data_source: verl's name of the data, by which it finds reward functions and teachers.
    """
    rows = len(table)
    message = pa.struct({"role": pa.string(), "content": pa.string()})
    user = _structs(role=pa.array(["user"] * rows), content=table["prompt"])
    reward = _structs(style=pa.array(["rule"] * rows), ground_truth=pa.array(_answers(table)))
    info = {name: table[name] for name in ("uid", "prompt_id", "sample_idx", "finish_reason", "meta")}
    return pa.table(
        {
            "data_source": pa.array([data_source] * rows),
            "prompt": pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32), user, pa.list_(message)),
            "ability": pa.array([""] * rows),
            "reward_model": reward,
            "extra_info": _structs(**info),
            "agent_loop_output": _structs(
                prompt_ids=table["prompt_ids"],
                response_ids=table["completion_ids"],
                response_mask=_like(table["completion_ids"], np.int32, 1),
                response_logprobs=table["rollout_logprobs"],
                extra_fields=_structs(**_verl_grades(table)),
            ),
        }
    )


def to_slime(table: pa.Table) -> pa.Table:
    """Scored rows for the paper's trainer."""
    metadata = _structs(
        is_lightning_opd=pa.array([True] * len(table)),
        response_tokens=table["completion_ids"],
        loss_mask=_like(table["completion_ids"], np.int32, 1),
        response=table["completion"],
        teacher_log_probs=table["teacher_logprobs"],
        student_log_probs=table["rollout_logprobs"],
        uid=table["uid"],
    )
    return pa.table({"prompt": table["prompt_ids"], "label": pa.array(_answers(table)), "metadata": metadata})


def _verl_grades(table: pa.Table) -> dict[str, pa.Array]:
    """Teacher ids and log-probs, (tokens of prompt and completion, 1 or k), each entry on the token that follows."""
    grades = {
        "teacher_ids": _ahead(table, table["completion_ids"], 1),
        "teacher_logprobs": _ahead(table, table["teacher_logprobs"], 1),
    }
    k = topk_of(table.schema)
    if k:
        grades["teacher_topk_ids"] = _ahead(table, table["teacher_topk_ids"], k)
        grades["teacher_topk_logprobs"] = _ahead(table, table["teacher_topk_logprobs"], k)
    return grades


def _ahead(table: pa.Table, column: pa.ChunkedArray, width: int) -> pa.ListArray:
    """Values at the completion's tokens, moved to the token before; 0 elsewhere, as verl pads."""
    values = _leaves(column).reshape(-1, width)
    prompts, completions = _offsets(table["prompt_ids"]), _offsets(table["completion_ids"])
    offsets = prompts + completions
    rows = np.repeat(np.arange(len(table)), np.diff(completions))
    place = np.arange(len(values)) + prompts[1:][rows] - 1
    moved = np.zeros((offsets[-1], width), values.dtype)
    moved[place] = values
    inner = pa.ListArray.from_arrays(np.arange(len(moved) + 1, dtype=np.int32) * width, moved.reshape(-1))
    return pa.ListArray.from_arrays(offsets.astype(np.int32), inner)


def _joined(first: pa.ChunkedArray, second: pa.ChunkedArray) -> pa.ListArray:
    """Two columns of lists of ids as one: the first's of a row, then the second's."""
    starts, stops = _offsets(first), _offsets(second)
    offsets = starts + stops
    joined = np.empty(offsets[-1], np.int32)
    joined[np.arange(starts[-1]) + np.repeat(stops[:-1], np.diff(starts))] = _leaves(first)
    joined[np.arange(stops[-1]) + np.repeat(starts[1:], np.diff(stops))] = _leaves(second)
    return pa.ListArray.from_arrays(offsets.astype(np.int32), joined)


def _like(column: pa.ChunkedArray, dtype: type[np.generic], value: int) -> pa.ListArray:
    """Lists as long as those of `column`, of one value."""
    offsets = _offsets(column)
    return pa.ListArray.from_arrays(offsets.astype(np.int32), np.full(offsets[-1], value, dtype))


def _offsets(column: pa.ChunkedArray) -> np.ndarray:
    """Where each row's list begins among all values, and where the last ends; from 0."""
    offsets = column.combine_chunks().offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0]


def _leaves(column: pa.ChunkedArray) -> np.ndarray:
    values = column.combine_chunks().flatten()
    while pa.types.is_nested(values.type):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False)


def _structs(**columns: pa.Array | pa.ChunkedArray) -> pa.StructArray:
    arrays = [column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column for column in columns.values()]
    return pa.StructArray.from_arrays(arrays, list(columns))


def _answers(table: pa.Table) -> list[str]:
    """What a verifier compares with, of each row; empty where the prompt brought nothing along.

    Half a surrogate pair, which JSON can spell and no text can hold, becomes a question mark.
    """
    return [_answer(meta).encode(errors="replace").decode() for meta in table["meta"].to_pylist()]


def _answer(meta: str) -> str:
    try:
        found: Any = json.loads(meta)
    except (ValueError, RecursionError):  # ValueError: no JSON, or a number of thousands of digits
        return ""
    given = [found[name] for name in ANSWERS if found.get(name) is not None] if isinstance(found, dict) else []
    if not given:
        return ""
    return given[0] if isinstance(given[0], str) else json.dumps(given[0], ensure_ascii=False)
