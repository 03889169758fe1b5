"""A table of rollouts as the bytes of a shard, and back."""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from common.parquet_limits import ROW_GROUP_BYTES, ROW_GROUP_TOKENS, Announced, open_shard, refusing
from common.schema import widths_of

TOO_LARGE = "Take fewer prompts a shard, or shorten what the prompts bring along"


def encode(table: pa.Table, where: str = "") -> bytes:
    """The table as Parquet: byte-stream-split lists, zstd 1, page checksums, row groups capped by tokens and bytes.

    Measured on rollouts, this layout is smaller than dictionary encoding (which makes float columns larger than raw)
    and several times faster to write. Raises `DataError` when the shard or a row is larger than readers accept.
    """
    lists = [field for field in table.schema if pa.types.is_list(field.type)]
    layout: dict[str, Any] = {
        "compression": "zstd",
        "compression_level": 1,
        "data_page_version": "1.0",
        "use_dictionary": False,
        "column_encoding": {_leaf_path(field): "BYTE_STREAM_SPLIT" for field in lists},
        "write_page_checksum": True,
        "write_statistics": False,
    }
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, **layout) as writer:
        for start, stop in _row_groups(table):
            writer.write_table(table.slice(start, stop - start))
    data = sink.getvalue()
    open_shard(data, announced(table), where, fix=TOO_LARGE)
    return data


def announced(table: pa.Table) -> Announced:
    """What a commit of `table` announces."""
    prompt_tokens, tokens = (int(_row_values(table[name]).sum()) for name in ("prompt_ids", "completion_ids"))
    return Announced(len(table), prompt_tokens, tokens, *widths_of(table.schema))


def decode(data: bytes, announced: Announced, where: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in `data`, page checksums verified; only `columns`, in that order, when they are given.

    Raises:
        DataError: the bytes were altered, or hold something else than their commit announced. Nothing is decoded
            before footer and page headers are checked, so that no shard takes more memory than it announced.
    """
    file = open_shard(data, announced, where)
    names = file.schema_arrow.names if columns is None else list(columns)
    with refusing(where):
        return _whole(file.read(names, use_threads=False), names)


def iter_row_groups(
    data: bytes, announced: Announced, where: str, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """As `decode`, one row group after another; memory for one at a time."""
    file = open_shard(data, announced, where)
    names = file.schema_arrow.names if columns is None else list(columns)
    for group in range(file.num_row_groups):
        with refusing(where):
            table = _whole(file.read_row_group(group, names, use_threads=False), names)
        yield table


def _whole(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """`table` once Arrow has found its columns sound: pages may hold text that is no UTF-8, or fewer rows than said."""
    table.validate(full=True)
    return table.select(names)


def _leaf_path(field: pa.Field) -> str:
    """The name of a list column's values in Parquet."""
    return f"{field.name}.list.element" + (".list.element" if pa.types.is_nested(field.type.value_type) else "")


def _row_groups(table: pa.Table) -> list[tuple[int, int]]:
    """Slices of rows; each keeps both caps, or is one row."""
    tokens = _row_values(table["prompt_ids"]) + _row_values(table["completion_ids"])
    sizes = _row_bytes(table)
    groups, start, held_tokens, held_bytes = [], 0, 0, 0
    for index, (count, size) in enumerate(zip(tokens.tolist(), sizes.tolist(), strict=True)):
        if index > start and (held_tokens + count > ROW_GROUP_TOKENS or held_bytes + size > ROW_GROUP_BYTES):
            groups.append((start, index))
            start, held_tokens, held_bytes = index, 0, 0
        held_tokens, held_bytes = held_tokens + count, held_bytes + size
    return [*groups, (start, len(table))] if len(table) else []


def _row_bytes(table: pa.Table) -> np.ndarray:
    """Bytes of every row's values."""
    sizes, widths = np.zeros(len(table), np.int64), widths_of(table.schema)
    wide = {"rollout_topk_ids": widths.rollout_topk, "teacher_topk_ids": widths.topk}
    wide["teacher_topk_logprobs"] = widths.topk
    for field in table.schema:
        if field.type == pa.string():
            sizes += _row_sizes("binary_length", table[field.name])
        elif pa.types.is_list(field.type):
            sizes += 4 * wide.get(field.name, 1) * _row_values(table[field.name])
    return sizes


def _row_values(column: pa.ChunkedArray) -> np.ndarray:
    """Length of every list of the column, 0 for null."""
    return _row_sizes("list_value_length", column)


def _row_sizes(measure: str, column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(pc.call_function(measure, [column]), 0).to_numpy().astype(np.int64)
