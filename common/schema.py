"""One rollout as a row: the Arrow schema, rows as tables and back, and what every row must satisfy.

The same checks run when a row is written and when it is read, because a shifted or truncated column trains without
complaint. Missing values are errors, never defaults.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa

from common.errors import DataError
from common.row_checks import check_ids, check_logprobs, lengths_of, refuse

SCHEMA_VERSION = 2
PLAIN_COLUMNS = ("uid", "prompt_id", "sample_idx", "finish_reason", "prompt", "completion", "meta")
"""Columns of one value a row."""


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


def uid_of(prompt_id: str, sample_idx: int) -> str:
    """The name of a row: the same for the same sample of the same prompt, whoever makes it."""
    return f"{prompt_id}/{sample_idx}"


def arrow_schema(topk: int = 0) -> pa.Schema:
    """The columns of a shard; the two top-k columns are there only when `topk` > 0."""
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
    fields += [
        pa.field(name, pa.string(), nullable=False) for name in ("finish_reason", "prompt", "completion", "meta")
    ]
    return pa.schema(fields)


def to_table(rows: Sequence[Rollout], topk: int = 0) -> pa.Table:
    """Rows as an Arrow table of `arrow_schema(topk)`.

    Raises:
        DataError: a value does not fit its column, such as an id beyond 32 bits, a float64 log-prob that float32 knows
            only as infinite, another k than `topk`, or text with half a surrogate pair. Nothing is wrapped or cut.
    """
    schema = arrow_schema(topk)
    columns: dict[str, pa.Array] = {name: _plain(rows, name, schema.field(name).type) for name in PLAIN_COLUMNS}
    for name in ("prompt_ids", "completion_ids", "rollout_logprobs", "teacher_logprobs"):
        columns[name] = _lists(rows, name, schema.field(name).type)
    for name in ("topk_ids", "topk_logprobs") if topk else ():
        columns[f"teacher_{name}"] = _lists(rows, name, schema.field(f"teacher_{name}").type, topk)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def to_rows(table: pa.Table) -> list[Rollout]:
    """Rows of a table; per-token columns become numpy arrays."""
    topk = topk_of(table.schema)
    columns: dict[str, list[Any]] = {name: table[name].to_pylist() for name in PLAIN_COLUMNS}
    for name in ("prompt_ids", "completion_ids", "rollout_logprobs", "teacher_logprobs"):
        columns[name] = _arrays(table[name])
    for name in ("topk_ids", "topk_logprobs"):
        columns[name] = _arrays(table[f"teacher_{name}"], topk) if topk else [None] * len(table)
    return [*map(Rollout, *(columns[field.name] for field in fields(Rollout)))]


def leaf_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values, below all its lists."""
    while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind


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
    index = schema.get_field_index("teacher_topk_ids")
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
    expected = arrow_schema(topk_of(table.schema))
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
    if topk_of(table.schema):
        check_ids(table, "teacher_topk_ids", uids, vocab_size, where, lengths)
        check_logprobs(table, "teacher_topk_logprobs", lengths, uids, where)


def _plain(rows: Sequence[Rollout], name: str, kind: pa.DataType) -> pa.Array:
    values = [getattr(row, name) for row in rows]
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError):
        for row, value in zip(rows, values, strict=True):
            with _fitting(name, row):
                pa.array([value], kind)
        raise


def _list_of(kind: pa.DataType, size: int = -1) -> pa.DataType:
    """A list of values of which none may be null, which Parquet then need not say of each."""
    return pa.list_(pa.field("element", kind, nullable=False), size)


def _lists(rows: Sequence[Rollout], name: str, kind: pa.DataType, width: int = 0) -> pa.Array:
    """Arrays, shape (n,) or (n, width), as one Arrow list array; None becomes null."""
    given = [getattr(row, name) for row in rows]
    leaf = leaf_type(kind)
    dtype = leaf.to_pandas_dtype()
    try:
        values = [None if value is None else _exact(np.asarray(value), dtype, width) for value in given]
    except (OverflowError, TypeError, ValueError):
        for row, value in zip(rows, given, strict=True):
            with _fitting(name, row):
                if value is not None:
                    _exact(np.asarray(value), dtype, width)
        raise
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([0 if value is None else len(value) for value in values], out=offsets[1:])
    present = [value.reshape(-1) for value in values if value is not None]
    flat: pa.Array = pa.array(np.concatenate(present) if present else np.empty(0, dtype), leaf)
    if width:
        flat = pa.FixedSizeListArray.from_arrays(flat, type=kind.value_type)
    missing = pa.array([value is None for value in values], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=kind, mask=missing)


@contextmanager
def _fitting(name: str, row: Rollout) -> Iterator[None]:
    """A value that its column cannot hold, as a `DataError` with the row."""
    try:
        yield
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError) as error:
        raise DataError(f"{name} does not fit its column: {error}", where=f"row {ascii(row.uid)[1:-1]}") from None


def _exact(given: np.ndarray, dtype: type[np.generic], width: int) -> np.ndarray:
    """`given` as (n,) or (n, width) values of `dtype`, each the number it was, to the type's precision."""
    if given.ndim != (2 if width else 1) or (width and given.shape[1] != width):
        raise ValueError(f"it has the shape {given.shape}" + (f", not (tokens, {width})" if width else ""))
    if given.dtype == dtype or not given.size:
        return given if given.dtype == dtype else given.astype(dtype)
    if given.dtype.kind not in ("iu" if dtype is np.int32 else "iuf"):
        raise TypeError(f"it holds {given.dtype} values")
    with np.errstate(over="ignore"):
        cast = given.astype(dtype)
    changed = (cast != given) if dtype is np.int32 else (np.isinf(cast) & ~np.isinf(given))
    if changed.any():
        raise ValueError(f"{given[changed][0]} is beyond {np.dtype(dtype)}")
    return cast


def _arrays(column: pa.ChunkedArray, width: int = 0) -> list[np.ndarray | None]:
    values: list[np.ndarray | None] = []
    for chunk in column.chunks:
        leaf = chunk.values.values if width else chunk.values
        flat = leaf.to_numpy(zero_copy_only=False)
        flat = flat.reshape(-1, width) if width else flat
        offsets = chunk.offsets.to_numpy().tolist()  # Python's numbers slice faster than numpy's
        spans = zip(chunk.is_valid().to_pylist(), offsets, offsets[1:], strict=False)
        values += [flat[start:stop] if valid else None for valid, start, stop in spans]
    return values
