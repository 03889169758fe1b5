"""One rollout as a row: the Arrow schema, its encoding in Parquet, and what every row must satisfy.

The same checks run when a row is written and when it is read, because a shifted or truncated column trains without
complaint. Missing values are errors, never defaults.
"""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import DataError

SCHEMA_VERSION = 2
MAX_LOGPROB = 1e-4
"""Highest log-prob accepted, in nats: rounding may lift a certain token a little above 0."""
ROW_GROUP_TOKENS = 500_000
"""Tokens in a row group at most; bounds the memory of a reader whatever the row lengths."""


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
    topk_ids: np.ndarray | None = None  # (tokens, k) int32, most likely first
    topk_logprobs: np.ndarray | None = None  # (tokens, k) float32 nats
    finish_reason: str = "stop"
    prompt: str = ""
    completion: str = ""
    meta: str = "{}"


def arrow_schema(topk: int = 0) -> pa.Schema:
    """The columns of a shard; the two top-k columns are there only when `topk` > 0."""
    ids, logprobs = pa.list_(pa.int32()), pa.list_(pa.float32())
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
        fields.append(pa.field("teacher_topk_ids", pa.list_(pa.list_(pa.int32(), topk))))
        fields.append(pa.field("teacher_topk_logprobs", pa.list_(pa.list_(pa.float32(), topk))))
    fields += [
        pa.field(name, pa.string(), nullable=False) for name in ("finish_reason", "prompt", "completion", "meta")
    ]
    return pa.schema(fields)


def to_table(rows: Sequence[Rollout], topk: int = 0) -> pa.Table:
    """Rows as an Arrow table of `arrow_schema(topk)`."""
    schema = arrow_schema(topk)
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(row, name) for row in rows], schema.field(name).type)
        for name in ("uid", "prompt_id", "sample_idx", "finish_reason", "prompt", "completion", "meta")
    }
    for name in ("prompt_ids", "completion_ids", "rollout_logprobs", "teacher_logprobs"):
        columns[name] = _lists([getattr(row, name) for row in rows], schema.field(name).type.value_type)
    if topk:
        columns["teacher_topk_ids"] = _lists([row.topk_ids for row in rows], pa.int32(), topk)
        columns["teacher_topk_logprobs"] = _lists([row.topk_logprobs for row in rows], pa.float32(), topk)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def to_rows(table: pa.Table) -> list[Rollout]:
    """Rows of a table; per-token columns become numpy arrays."""
    topk = topk_of(table.schema)
    columns: dict[str, list[Any]] = {
        name: table[name].to_pylist()
        for name in ("uid", "prompt_id", "sample_idx", "finish_reason", "prompt", "completion", "meta")
    }
    for name in ("prompt_ids", "completion_ids", "rollout_logprobs", "teacher_logprobs"):
        columns[name] = _arrays(table[name])
    top_ids = _arrays(table["teacher_topk_ids"], topk) if topk else [None] * len(table)
    top_logprobs = _arrays(table["teacher_topk_logprobs"], topk) if topk else [None] * len(table)
    return [
        Rollout(
            **{name: column[index] for name, column in columns.items()},
            topk_ids=top_ids[index],
            topk_logprobs=top_logprobs[index],
        )
        for index in range(len(table))
    ]


def topk_of(schema: pa.Schema) -> int:
    """How many teacher log-probs per token the schema stores beside the sampled one; 0 for none."""
    index = schema.get_field_index("teacher_topk_ids")
    return schema.field(index).type.value_type.list_size if index >= 0 else 0


def encode(table: pa.Table) -> bytes:
    """The table as Parquet: byte-stream-split lists, zstd 1, page checksums, row groups capped by tokens.

    Measured on rollouts, this layout is smaller than dictionary encoding (which makes float columns larger than raw)
    and several times faster to write.
    """
    leaves = {
        name: "list.element.list.element" if "topk" in name else "list.element" for name in _list_columns(table.schema)
    }
    layout: dict[str, Any] = {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": ["finish_reason"],
        "column_encoding": {f"{name}.{leaf}": "BYTE_STREAM_SPLIT" for name, leaf in leaves.items()},
        "write_page_checksum": True,
        "write_statistics": False,
    }
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, **layout) as writer:
        for start, stop in _row_groups(table):
            writer.write_table(table.slice(start, stop - start))
    return sink.getvalue()


def decode(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in `data`, page checksums verified. Raises `pa.ArrowException` or `OSError` on altered bytes."""
    names = list(columns) if columns is not None else None
    return pq.read_table(pa.BufferReader(data), columns=names, page_checksum_verification=True, use_threads=False)


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
    expected = arrow_schema(topk_of(table.schema))
    if not table.schema.equals(expected):
        raise DataError(_schema_difference(table.schema, expected), where=where)
    uids = table["uid"].to_pylist()
    for name in expected.names:
        if not expected.field(name).nullable:
            _refuse(table[name].is_null().to_numpy(), uids, f"{name} is missing", where)
    if len(set(uids)) != len(uids):
        twice = Counter(uids).most_common(1)[0][0]
        raise DataError("a uid stands twice", where=f"{where}, row {twice}")
    lengths = _lengths(table, "completion_ids", uids, where)
    _refuse(lengths == 0, uids, "a completion is empty", where)
    _refuse(_lengths(table, "prompt_ids", uids, where) == 0, uids, "a prompt is empty", where)
    for name in ("prompt_ids", "completion_ids"):
        _check_ids(table, name, uids, vocab_size, where)
    _check_logprobs(table, "rollout_logprobs", lengths, uids, where)
    if scored:
        _check_logprobs(table, "teacher_logprobs", lengths, uids, where)
    elif table["teacher_logprobs"].null_count != len(table):
        raise DataError("teacher log-probs in a dataset that is not scored", where=where)
    if topk_of(table.schema):
        _check_ids(table, "teacher_topk_ids", uids, vocab_size, where, lengths)
        _check_logprobs(table, "teacher_topk_logprobs", lengths, uids, where)


def _lists(values: Sequence[np.ndarray | None], leaf: pa.DataType, width: int = 0) -> pa.Array:
    """Arrays, shape (n,) or (n, width), as one Arrow list array; None becomes null."""
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([0 if value is None else len(value) for value in values], out=offsets[1:])
    present = [np.asarray(value, leaf.to_pandas_dtype()).reshape(-1) for value in values if value is not None]
    flat: pa.Array = pa.array(np.concatenate(present) if present else np.empty(0, leaf.to_pandas_dtype()), leaf)
    if width:
        flat = pa.FixedSizeListArray.from_arrays(flat, width)
    missing = pa.array([value is None for value in values], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=pa.list_(flat.type), mask=missing)


def _arrays(column: pa.ChunkedArray, width: int = 0) -> list[np.ndarray | None]:
    values: list[np.ndarray | None] = []
    for chunk in column.chunks:
        leaf = chunk.values.values if width else chunk.values
        flat = leaf.to_numpy(zero_copy_only=False)
        flat = flat.reshape(-1, width) if width else flat
        offsets = chunk.offsets.to_numpy()
        spans = zip(chunk.is_valid().to_pylist(), offsets, offsets[1:], strict=False)
        values += [flat[start:stop] if valid else None for valid, start, stop in spans]
    return values


def _list_columns(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if pa.types.is_list(field.type)]


def _row_groups(table: pa.Table) -> list[tuple[int, int]]:
    tokens = np.diff(table["completion_ids"].combine_chunks().offsets.to_numpy())
    tokens = tokens + np.diff(table["prompt_ids"].combine_chunks().offsets.to_numpy())
    groups, start, held = [], 0, 0
    for index, count in enumerate(tokens):
        if held and held + count > ROW_GROUP_TOKENS:
            groups.append((start, index))
            start, held = index, 0
        held += int(count)
    return [*groups, (start, len(table))]


def _schema_difference(found: pa.Schema, expected: pa.Schema) -> str:
    missing = [name for name in expected.names if name not in found.names]
    if missing:
        return f"column {missing[0]} is missing"
    extra = [name for name in found.names if name not in expected.names]
    if extra:
        return f"column {extra[0]} does not belong here"
    wrong = next((name for name in expected.names if not found.field(name).equals(expected.field(name))), None)
    if wrong is None:
        return "the columns are not in their order"
    return f"column {wrong} is {found.field(wrong).type}, not {expected.field(wrong).type}"


def _lengths(table: pa.Table, name: str, uids: Sequence[str], where: str) -> np.ndarray:
    column = table[name].combine_chunks()
    _refuse(column.is_null().to_numpy(zero_copy_only=False), uids, f"{name} is missing", where)
    return np.diff(column.offsets.to_numpy())  # (rows,)


def _leaf(table: pa.Table, name: str, lengths: np.ndarray, uids: Sequence[str], where: str) -> np.ndarray:
    """All values of a list column one after another; a null is refused at every level, for flattening drops it."""
    values = table[name].combine_chunks().flatten()
    while True:
        if values.null_count:
            position = int(values.is_null().to_numpy(zero_copy_only=False).argmax())
            row = _row_of(position, lengths, len(values))
            raise DataError(f"{name} holds a null", where=f"{where}, row {uids[row]}")
        if not pa.types.is_fixed_size_list(values.type):
            return values.to_numpy(zero_copy_only=False)
        values = values.flatten()


def _check_ids(
    table: pa.Table, name: str, uids: Sequence[str], vocab_size: int, where: str, expected: np.ndarray | None = None
) -> None:
    lengths = _lengths(table, name, uids, where)
    if expected is not None:
        _refuse(lengths != expected, uids, f"{name} and completion_ids differ in length", where)
    ids = _leaf(table, name, lengths, uids, where)
    bad = (ids < 0) | (ids >= vocab_size)
    if bad.any():
        row = _row_of(int(bad.argmax()), lengths, len(ids))
        raise DataError(
            f"token id {int(ids[bad.argmax()])} in {name} is outside the vocabulary of {vocab_size}",
            where=f"{where}, row {uids[row]}",
        )


def _check_logprobs(table: pa.Table, name: str, expected: np.ndarray, uids: Sequence[str], where: str) -> None:
    lengths = _lengths(table, name, uids, where)
    _refuse(lengths != expected, uids, f"{name} and completion_ids differ in length", where)
    values = _leaf(table, name, lengths, uids, where)
    bad = ~np.isfinite(values) | (values > MAX_LOGPROB)
    if bad.any():
        row = _row_of(int(bad.argmax()), lengths, len(values))
        raise DataError(f"{name} holds {values[bad.argmax()]}, which is no log-prob", where=f"{where}, row {uids[row]}")


def _row_of(position: int, lengths: np.ndarray, leaves: int) -> int:
    width = leaves // max(int(lengths.sum()), 1)  # 1, or k for a top-k column
    return int(np.searchsorted(np.cumsum(lengths) * width, position, side="right"))


def _refuse(bad: np.ndarray, uids: Sequence[str], what: str, where: str) -> None:
    if bad.any():
        raise DataError(what, where=f"{where}, row {uids[int(bad.argmax())]}")
