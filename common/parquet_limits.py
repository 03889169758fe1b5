"""What a shard may hold, checked against what its commit announces before anything is decoded.

A hash proves that a shard is the one that was committed, not that its maker meant well. A few hundred bytes of Parquet
can announce a billion nulls, or decompress to as many gigabytes as they like. So a shard is opened only when footer and
page headers say what commit and plan say, in the one layout that `common.parquet.encode` writes: no dictionary (which
repeats a long text at will), no other codec or encoding, no encryption, no page without checksum. What is left cannot
grow: every stored value is there in full once a page is decompressed, and the sizes of all pages are known by then.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import DataError
from common.parquet_pages import BadPage, pages
from common.schema import leaf_type, schema_difference

MAX_SHARD_BYTES = 4 << 30
"""Decoded bytes of a shard at most, thirty times the largest one that is recommended."""
ROW_GROUP_TOKENS = 500_000
"""Prompt and completion tokens in a row group of several rows at most."""
ROW_GROUP_BYTES = 64 << 20
"""Decoded bytes of a row group of several rows, about; bounds the memory of a reader by row groups."""
MAX_ROW_BYTES = 1 << 30
"""Decoded bytes of one row at most, which is a row group of its own when it is long."""
TEXT_PER_SHARD, TEXT_PER_ROW, TEXT_PER_TOKEN = 64 << 20, 8 << 20, 1 << 10
"""Bytes of all text columns at most. No tokenizer in use has a token of 1 KiB; the rest is for `meta`, which may carry
the test cases of a programming task."""
VALUE_BYTES = 7
"""Bytes of a list's value at most: 4 of its own, less than 1 for each of its two levels, less than 1 of page header."""
CHUNK_BYTES = 1 << 10
"""Bytes of a column chunk beside its values: the first page's header and the lengths of its levels."""
FOOTER_BYTES, FOOTER_CHUNK_BYTES = 1 << 16, 512
"""Bytes of a footer: for the schema, and for each column of each row group (about 120 are needed)."""
MAX_ROW_GROUPS = 8192
MAGIC = b"PAR1"
PLAIN, BYTE_STREAM_SPLIT = 0, 9  # the numbers of the encodings in a page header
NAMES = {PLAIN: "PLAIN", BYTE_STREAM_SPLIT: "BYTE_STREAM_SPLIT"}
PHYSICAL = {pa.int32(): "INT32", pa.float32(): "FLOAT", pa.string(): "BYTE_ARRAY"}
DISTRUST = "Its hash is right, so it was made like this: do not trust this dataset"


@dataclass(frozen=True)
class Announced:
    """What commit and plan say of a shard, before a byte of it is decoded."""

    rows: int
    prompt_tokens: int
    tokens: int  # of the completions
    topk: int


def open_shard(
    data: bytes, announced: Announced, expected: pa.Schema, where: str, fix: str = DISTRUST
) -> pq.ParquetFile:
    """The shard, ready to be decoded; its footer and all its page headers fit what is announced.

    Raises:
        DataError: they do not, or `data` is no Parquet.
    """
    with refusing(where, fix):
        _check_footer_length(data, announced, expected)
        file = pq.ParquetFile(
            pa.BufferReader(data),
            page_checksum_verification=True,
            pre_buffer=False,
            thrift_string_size_limit=FOOTER_BYTES,
            thrift_container_size_limit=MAX_ROW_GROUPS,
        )
        _check_schema(file.schema_arrow, expected)
        _check_row_groups(file.metadata, announced)
        _check_totals(file.metadata, announced, expected)
        _check_chunks(file.metadata, data, expected)
    return file


@contextmanager
def refusing(where: str, fix: str = DISTRUST) -> Iterator[None]:
    """What pyarrow raises on bytes that it cannot read, as a `DataError`."""
    try:
        yield
    except _Refused as error:
        raise DataError(str(error), where=where, fix=fix) from None
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(f"the shard is not readable Parquet: {reason}", where=where, fix=fix) from None


class _Refused(Exception):
    """The footer says what we do not accept."""


def _check_footer_length(data: bytes, announced: Announced, expected: pa.Schema) -> None:
    """Footer length and both magics, before the footer is parsed: it takes several times its length in memory."""
    if len(data) < 12 or data[:4] != MAGIC or data[-4:] != MAGIC:
        raise _Refused("the shard is no Parquet file, or an encrypted one")
    length = int.from_bytes(data[-8:-4], "little")
    groups = min(MAX_ROW_GROUPS, max(1, announced.rows))
    if length > min(len(data) - 12, FOOTER_BYTES + groups * len(expected) * FOOTER_CHUNK_BYTES):
        raise _Refused(f"the shard says that its footer has {length} bytes")


def _check_schema(found: pa.Schema, expected: pa.Schema) -> None:
    if not found.equals(expected):
        raise _Refused(schema_difference(found, expected))


def _check_row_groups(metadata: Any, announced: Announced) -> None:
    if metadata.num_rows != announced.rows:
        raise _Refused(f"the footer says {metadata.num_rows} rows, the commit {announced.rows}")
    groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    if sum(groups) != announced.rows or min(groups, default=1) < 1:
        raise _Refused("the rows of the row groups do not add up")
    if len(groups) > MAX_ROW_GROUPS:
        raise _Refused(f"{len(groups)} row groups")


def _check_totals(metadata: Any, announced: Announced, expected: pa.Schema) -> None:
    """Values and bytes of every column over all row groups, and bytes of every row group."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    text = 0
    for index, field in enumerate(expected):
        chunks = [group.column(index) for group in groups]
        values = sum(chunk.num_values for chunk in chunks)
        if values not in _announced_values(field, announced):
            needed = " or ".join(str(count) for count in sorted(_announced_values(field, announced)))
            raise _Refused(f"the footer says {values} values of {field.name}, the commit {needed}")
        if field.type == pa.string():
            text += sum(chunk.total_uncompressed_size for chunk in chunks)
    tokens = announced.prompt_tokens + announced.tokens
    if text > TEXT_PER_SHARD + TEXT_PER_ROW * announced.rows + TEXT_PER_TOKEN * tokens:
        raise _Refused(f"{text} bytes of text for {announced.rows} rows and {tokens} tokens")
    sizes = [sum(group.column(index).total_uncompressed_size for index in range(len(expected))) for group in groups]
    if sum(sizes) > MAX_SHARD_BYTES:
        raise _Refused(f"the shard decodes to {sum(sizes)} bytes; at most {MAX_SHARD_BYTES} are read")
    for group, size in zip(groups, sizes, strict=True):
        if size > (MAX_ROW_BYTES if group.num_rows == 1 else 2 * ROW_GROUP_BYTES):
            raise _Refused(f"a row group of {group.num_rows} rows decodes to {size} bytes")


def _announced_values(field: pa.Field, announced: Announced) -> set[int]:
    """How many values the column may have; a null or empty list would count as one."""
    if not pa.types.is_list(field.type):
        return {announced.rows}
    if field.name == "prompt_ids":
        return {announced.prompt_tokens}
    inner = field.type.value_type
    values = announced.tokens * (inner.list_size if pa.types.is_fixed_size_list(inner) else 1)
    return {values, announced.rows} if field.name == "teacher_logprobs" else {values}


def _check_chunks(metadata: Any, data: bytes, expected: pa.Schema) -> None:
    """Every column chunk follows the last one, and its pages are what the footer says of them."""
    view, at = memoryview(data), len(MAGIC)
    for group in range(metadata.num_row_groups):
        for index, field in enumerate(expected):
            chunk = metadata.row_group(group).column(index)
            _check_chunk(chunk, field, at)
            stop = at + chunk.total_compressed_size
            if not at <= stop <= len(data) - 8 - metadata.serialized_size:
                raise _Refused(f"{field.name} lies outside the file")
            _check_pages(view, at, chunk, field)
            at = stop


def _check_chunk(chunk: Any, field: pa.Field, at: int) -> None:
    """One column chunk by the footer's word: layout and size."""
    leaf, encoding = leaf_type(field), NAMES[_encoding(field)]
    if chunk.physical_type != PHYSICAL[leaf]:
        raise _Refused(f"{field.name} is stored as {chunk.physical_type}")
    if chunk.compression != "ZSTD" or chunk.file_path or chunk.dictionary_page_offset is not None:
        raise _Refused(f"{field.name} is not stored as zstd pages without dictionary")
    if not {*chunk.encodings} <= {"RLE", encoding}:
        raise _Refused(f"{field.name} is encoded as {', '.join(chunk.encodings)}, not {encoding}")
    if chunk.data_page_offset != at:
        raise _Refused(f"{field.name} does not begin where the last column ends")
    if chunk.num_values < 0 or chunk.total_uncompressed_size < 0:
        raise _Refused(f"{field.name} has a negative size")
    if leaf != pa.string() and chunk.total_uncompressed_size > VALUE_BYTES * chunk.num_values + CHUNK_BYTES:
        raise _Refused(f"{chunk.num_values} values of {field.name} in {chunk.total_uncompressed_size} bytes")


def _check_pages(view: memoryview, start: int, chunk: Any, field: pa.Field) -> None:
    """The pages of a chunk have the values, bytes and encoding of which the footer speaks."""
    values = size = 0
    try:
        for page in pages(view, start, start + chunk.total_compressed_size):
            values, size = values + page.values, size + page.header + page.uncompressed
            if page.encoding != _encoding(field):
                raise _Refused(f"{field.name} has a page of another encoding")
    except BadPage as error:
        raise _Refused(f"{field.name} has {error}") from None
    if (values, size) != (chunk.num_values, chunk.total_uncompressed_size):
        raise _Refused(f"the pages of {field.name} are not those of which the footer speaks")


def _encoding(field: pa.Field) -> int:
    return BYTE_STREAM_SPLIT if pa.types.is_list(field.type) else PLAIN
