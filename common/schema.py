"""One rollout as a row: the Arrow schema, rows as tables and back, and what every row must satisfy.

The same checks run when a row is written and when it is read, because a shifted or truncated column trains without
complaint. Missing values are errors, never defaults.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from common.columns import arrays_of, list_column, plain_column
from common.errors import DataError
from common.row_checks import check_ids, check_logprobs, lengths_of, refuse

SCHEMA_VERSION = 2
PLAIN_COLUMNS = ("uid", "prompt_id", "sample_idx", "finish_reason", "prompt", "completion", "meta")
"""Columns of one value a row."""


class Widths(NamedTuple):
    """How many ids each position holds in the top-k columns; 0 where they are not there."""

    topk: int = 0
    """Ids that the teacher graded beside the sampled one, and their log-probs."""
    rollout_topk: int = 0
    """The student's most likely ids when it sampled."""


@dataclass(frozen=True)
class Rollout:
    """One sampled completion and its grades; every per-token array has the length of `completion_ids`."""

    uid: str
    prompt_id: str
    sample_idx: int
    prompt_ids: np.ndarray  # (prompt,) int32
    completion_ids: np.ndarray  # (tokens,) int32, EOS included when it was sampled
    rollout_logprobs: np.ndarray  # (tokens,) float32 nats, under the distribution that sampled
    teacher_logprobs: np.ndarray | None = None  # (tokens,) float32 nats, at temperature 1
    topk_ids: np.ndarray | None = None  # (tokens, k) int32, most likely first under whom the plan names
    topk_logprobs: np.ndarray | None = None  # (tokens, k) float32 nats, of the teacher
    rollout_topk_ids: np.ndarray | None = None  # (tokens, k) int32, most likely first under the student
    finish_reason: str = "stop"
    prompt: str = ""
    completion: str = ""
    meta: str = "{}"


def uid_of(prompt_id: str, sample_idx: int) -> str:
    """The name of a row: the same for the same sample of the same prompt, whoever makes it."""
    return f"{prompt_id}/{sample_idx}"


def arrow_schema(topk: int = 0, rollout_topk: int = 0) -> pa.Schema:
    """The columns of a shard; those of top-k are there only when they are wider than 0, as `Widths` says."""
    ids, logprobs = _list_of(pa.int32()), _list_of(pa.float32())
    fields = [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_idx", pa.int32(), nullable=False),
        pa.field("prompt_ids", ids, nullable=False),
        pa.field("completion_ids", ids, nullable=False),
        pa.field("rollout_logprobs", logprobs, nullable=False),
        pa.field("teacher_logprobs", logprobs),
    ]
    if topk:
        fields.append(pa.field("teacher_topk_ids", _list_of(_list_of(pa.int32(), topk))))
        fields.append(pa.field("teacher_topk_logprobs", _list_of(_list_of(pa.float32(), topk))))
    if rollout_topk:
        fields.append(pa.field("rollout_topk_ids", _list_of(_list_of(pa.int32(), rollout_topk)), nullable=False))
    fields += [
        pa.field(name, pa.string(), nullable=False) for name in ("finish_reason", "prompt", "completion", "meta")
    ]
    return pa.schema(fields)


def to_table(rows: Sequence[Rollout], topk: int = 0, rollout_topk: int = 0) -> pa.Table:
    """Rows as an Arrow table of `arrow_schema(topk, rollout_topk)`; a top-k column of width 0 is left out.

    Raises:
        DataError: a value does not fit its column, such as an id beyond 32 bits, a float64 log-prob that float32 knows
            only as infinite, a k that is not the
            column's, or text with half a surrogate pair. Nothing is wrapped or cut.
    """
    schema = arrow_schema(topk, rollout_topk)
    columns: dict[str, pa.Array] = {name: plain_column(rows, name, schema.field(name).type) for name in PLAIN_COLUMNS}
    for name in ("prompt_ids", "completion_ids", "rollout_logprobs", "teacher_logprobs"):
        columns[name] = list_column(rows, name, schema.field(name).type)
    for name in ("topk_ids", "topk_logprobs") if topk else ():
        columns[f"teacher_{name}"] = list_column(rows, name, schema.field(f"teacher_{name}").type, topk)
    if rollout_topk:
        columns["rollout_topk_ids"] = list_column(
            rows, "rollout_topk_ids", schema.field("rollout_topk_ids").type, rollout_topk
        )
    return pa.table([columns[name] for name in schema.names], schema=schema)


def to_rows(table: pa.Table) -> list[Rollout]:
    """Rows of a table; per-token columns become numpy arrays."""
    topk, rollout_topk = widths_of(table.schema)
    columns: dict[str, list[Any]] = {name: table[name].to_pylist() for name in PLAIN_COLUMNS}
    for name in ("prompt_ids", "completion_ids", "rollout_logprobs", "teacher_logprobs"):
        columns[name] = arrays_of(table[name])
    for name in ("topk_ids", "topk_logprobs"):
        columns[name] = arrays_of(table[f"teacher_{name}"], topk) if topk else [None] * len(table)
    columns["rollout_topk_ids"] = (
        arrays_of(table["rollout_topk_ids"], rollout_topk) if rollout_topk else [None] * len(table)
    )
    return [*map(Rollout, *(columns[field.name] for field in fields(Rollout)))]


def schema_difference(found: pa.Schema, expected: pa.Schema) -> str:
    """The first difference of two schemas that are not equal, in words."""
    missing = [name for name in expected.names if name not in found.names]
    if missing:
        return f"column {missing[0]} is missing"
    extra = [name for name in found.names if name not in expected.names]
    if extra:
        return f"column {extra[0]} does not belong here"
    twice = [name for name in expected.names if found.names.count(name) > 1]
    if twice:
        return f"column {twice[0]} stands twice"
    wrong = next((name for name in expected.names if not found.field(name).equals(expected.field(name))), None)
    if wrong is None:
        return "the columns are not in their order"
    return f"column {wrong} is {found.field(wrong).type}, not {expected.field(wrong).type}"


def topk_of(schema: pa.Schema) -> int:
    """How many teacher log-probs per token the schema stores beside the sampled one; 0 for none."""
    return _width(schema, "teacher_topk_ids")


def widths_of(schema: pa.Schema) -> Widths:
    """The widths of the top-k columns in a schema."""
    return Widths(topk_of(schema), _width(schema, "rollout_topk_ids"))


def widths_in(plan: Mapping[str, Any]) -> Widths:
    """The widths of the top-k columns of a plan's dataset; plans without a word on the student's have none."""
    return Widths(plan["topk"], plan.get("rollout_topk", 0))


def _width(schema: pa.Schema, name: str) -> int:
    index = schema.get_field_index(name)
    kind = schema.field(index).type if index >= 0 else pa.null()
    inner = kind.value_type if pa.types.is_list(kind) else kind
    return inner.list_size if pa.types.is_fixed_size_list(inner) else 0


def check_table(table: pa.Table, *, vocab_size: int, scored: bool, where: str) -> None:
    """Refuse a table that breaks the contract, naming the first bad row.

    Args:
        vocab_size: ids must lie in [0, vocab_size).
        scored: whether teacher log-probs must be there (or must not).
        where: the shard, for the message.

    Raises:
        DataError: a column is missing or of another type, lengths differ, an id is outside the vocabulary, a
            log-prob is NaN, infinite or positive, a uid stands twice.
    """
    widths = widths_of(table.schema)
    expected = arrow_schema(*widths)
    if not table.schema.equals(expected):
        raise DataError(schema_difference(table.schema, expected), where=where)
    uids = table["uid"].to_pylist()
    for name in expected.names:
        if not expected.field(name).nullable:
            refuse(table[name].is_null().to_numpy(), uids, f"{name} is missing", where)
    if len(set(uids)) != len(uids):
        twice = Counter(uids).most_common(1)[0][0]
        raise DataError("a uid stands twice", where=f"{where}, row {twice}")
    lengths = lengths_of(table, "completion_ids", uids, where)
    refuse(lengths == 0, uids, "a completion is empty", where)
    refuse(lengths_of(table, "prompt_ids", uids, where) == 0, uids, "a prompt is empty", where)
    for name in ("prompt_ids", "completion_ids"):
        check_ids(table, name, uids, vocab_size, where)
    check_logprobs(table, "rollout_logprobs", lengths, uids, where)
    if scored:
        check_logprobs(table, "teacher_logprobs", lengths, uids, where)
    elif table["teacher_logprobs"].null_count != len(table):
        raise DataError("teacher log-probs in a dataset that is not scored", where=where)
    if widths.rollout_topk:
        check_ids(table, "rollout_topk_ids", uids, vocab_size, where, lengths)
    if widths.topk:
        check_ids(table, "teacher_topk_ids", uids, vocab_size, where, lengths)
        check_logprobs(table, "teacher_topk_logprobs", lengths, uids, where)


def _list_of(kind: pa.DataType, size: int = -1) -> pa.DataType:
    """A list of values of which none may be null, which Parquet then need not say of each."""
    return pa.list_(pa.field("element", kind, nullable=False), size)
