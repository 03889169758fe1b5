"""What a shard may hold, checked against what its commit announces before anything is decoded.

A hash proves that a shard is the one that was committed, not that its maker meant well. A few hundred bytes of Parquet
can announce a billion empty lists, or decompress to as many gigabytes as they like. So a shard is opened only when
footer and page headers say what commit and plan say, in the one layout that `common.parquet.encode` writes: no
dictionary (which repeats a long text at will), no other codec or encoding, no encryption, no page without checksum.
What is left cannot grow: every stored value is there in full once a page is decompressed, and the sizes of all pages
are known by then. Nor does a null stand for more than itself, since by the schema only the list of a whole row may be
null: a null list of k values within it would cost no byte in the file and k values in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from common.columns import leaf_type
from common.errors import DataError
from common.parquet_metadata import MAGIC, Chunk, Footer, RowGroup, read_footer, read_pages
from common.schema import arrow_schema, schema_difference
from common.thrift import Malformed

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
MAX_ROW_GROUPS = 8192
FOOTER_BYTES, FOOTER_CHUNK_BYTES = 1 << 16, 256
"""Bytes of a footer at most: for the schema, and for each column of each row group, which takes about 80."""
VALUE_BYTES = 7
"""Bytes of a list's value at most: 4 of its own, less than 1 for each of its two levels (of repetition, of definition),
less than 1 of page header."""
CHUNK_BYTES = 1 << 10
"""Bytes of a column chunk beside its values: the first page's header and the lengths of its levels."""
PAGES, PAGE_BYTES = 16, 1 << 16
"""Pages of a column chunk at most: so many, and one more for so many bytes. Those we write have up to 1 MiB."""
BYTE_ARRAY, INT32, FLOAT = 6, 1, 4  # physical types
PLAIN, RLE, BYTE_STREAM_SPLIT = 0, 3, 9  # encodings
ZSTD = 6
PHYSICAL = {pa.int32(): INT32, pa.float32(): FLOAT, pa.string(): BYTE_ARRAY}
DISTRUST = "Its hash is right, so it was made like this: do not trust this dataset"


@dataclass(frozen=True)
class Announced:
    """What commit and plan say of a shard, before a byte of it is decoded."""

    rows: int
    prompt_tokens: int
    tokens: int  # of the completions
    topk: int
    rollout_topk: int = 0


def open_shard(data: bytes, announced: Announced, where: str, fix: str = DISTRUST) -> pq.ParquetFile:
    """The shard, ready to be decoded; its footer and all its page headers fit what is announced.

    Raises:
        DataError: they do not, or `data` is no Parquet.
    """
    with refusing(where, fix):
        expected = arrow_schema(announced.topk, announced.rollout_topk)
        _check_length(data, announced, expected)
        footer = read_footer(data)
        _check_rows(footer, announced, expected)
        _check_values(footer, announced, expected)
        _check_sizes(footer, announced, expected)
        _check_chunks(footer, data, expected)
        file = pq.ParquetFile(
            pa.BufferReader(data),
            page_checksum_verification=True,
            pre_buffer=False,
            thrift_string_size_limit=FOOTER_BYTES,
            thrift_container_size_limit=MAX_ROW_GROUPS,
        )
        if not file.schema_arrow.equals(expected):
            raise _Refused(schema_difference(file.schema_arrow, expected))
    return file


class _Refused(Exception):
    """The shard says something that we do not accept."""


@contextmanager
def refusing(where: str, fix: str = DISTRUST) -> Iterator[None]:
    """What is raised on bytes that cannot or must not be read, as a `DataError`."""
    try:
        yield
    except _Refused as error:
        raise DataError(str(error), where=where, fix=fix) from None
    except Malformed as error:
        raise DataError(f"the shard is not readable Parquet: it has {error}", where=where, fix=fix) from None
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise DataError(f"the shard is not readable Parquet: {reason}", where=where, fix=fix) from None


def _check_length(data: bytes, announced: Announced, expected: pa.Schema) -> None:
    """The footer's length, before it is parsed: that takes several times as much memory."""
    length = int.from_bytes(data[-8:-4], "little")
    if length > _footer_length(min(announced.rows, MAX_ROW_GROUPS), expected):
        raise _Refused(f"the shard says that its footer has {length} bytes")


def _footer_length(groups: int, expected: pa.Schema) -> int:
    return FOOTER_BYTES + groups * len(expected) * FOOTER_CHUNK_BYTES


def _check_rows(footer: Footer, announced: Announced, expected: pa.Schema) -> None:
    if footer.encrypted:
        raise _Refused("the shard is encrypted")
    if footer.rows != announced.rows:
        raise _Refused(f"the footer says {footer.rows} rows, the commit {announced.rows}")
    rows = [group.rows for group in footer.groups]
    if sum(rows) != announced.rows or min(rows, default=1) < 1:
        raise _Refused("the rows of the row groups do not add up")
    if len(rows) > MAX_ROW_GROUPS:
        raise _Refused(f"{len(rows)} row groups; at most {MAX_ROW_GROUPS} are read")
    if any(len(group.chunks) != len(expected) for group in footer.groups):
        raise _Refused(f"the footer does not speak of {len(expected)} columns")


def _check_values(footer: Footer, announced: Announced, expected: pa.Schema) -> None:
    """How many values every column has over all row groups."""
    for field, chunks in zip(expected, _columns(footer, expected), strict=True):
        values = sum(chunk.values for chunk in chunks)
        allowed = _announced_values(field, announced)
        if values not in allowed:
            counts = " or ".join(str(count) for count in sorted(allowed))
            raise _Refused(f"the footer says {values} values of {field.name}, the commit {counts}")


def _announced_values(field: pa.Field, announced: Announced) -> set[int]:
    """How many values the column may have; a null or empty list would count as one."""
    if not pa.types.is_list(field.type):
        return {announced.rows}
    if field.name == "prompt_ids":
        return {announced.prompt_tokens}
    inner = field.type.value_type
    values = announced.tokens * (inner.list_size if pa.types.is_fixed_size_list(inner) else 1)
    return {values, announced.rows} if field.name == "teacher_logprobs" else {values}


def _check_sizes(footer: Footer, announced: Announced, expected: pa.Schema) -> None:
    """How many bytes the text, every row group and the whole shard are when they are decoded."""
    columns = zip(expected, _columns(footer, expected), strict=True)
    text = sum(chunk.uncompressed for field, chunks in columns if field.type == pa.string() for chunk in chunks)
    tokens = announced.prompt_tokens + announced.tokens
    if text > TEXT_PER_SHARD + TEXT_PER_ROW * announced.rows + TEXT_PER_TOKEN * tokens:
        raise _Refused(f"{text} bytes of text for {announced.rows} rows and {tokens} tokens")
    for group in footer.groups:
        size = _decoded(group)
        if size > (MAX_ROW_BYTES if group.rows == 1 else 2 * ROW_GROUP_BYTES):
            raise _Refused(f"a row group of {group.rows} rows decodes to {size} bytes")
    size = sum(_decoded(group) for group in footer.groups)
    if size > MAX_SHARD_BYTES:
        raise _Refused(f"the shard decodes to {size} bytes; at most {MAX_SHARD_BYTES} are read")


def _decoded(group: RowGroup) -> int:
    """Bytes in memory: a list that is null or empty counts as a value and takes almost no byte in a page."""
    return sum(max(chunk.uncompressed, 4 * chunk.values) for chunk in group.chunks)


def _columns(footer: Footer, expected: pa.Schema) -> list[list[Chunk]]:
    return [[group.chunks[index] for group in footer.groups] for index in range(len(expected))]


def _check_chunks(footer: Footer, data: bytes, expected: pa.Schema) -> None:
    """Every column chunk follows the last one, in our layout, and its pages are what the footer says of them."""
    view, at = memoryview(data), len(MAGIC)
    for group in footer.groups:
        for field, chunk in zip(expected, group.chunks, strict=True):
            _check_layout(field, chunk)
            if chunk.first_page != at or at + chunk.compressed > footer.start:
                raise _Refused(f"{field.name} does not lie where it must")
            _check_pages(field, chunk, view)
            at += chunk.compressed
    if at != footer.start:
        raise _Refused("there is something between the last column and the footer")


def _check_layout(field: pa.Field, chunk: Chunk) -> None:
    leaf = leaf_type(field.type)
    if not chunk.plain or chunk.codec != ZSTD or chunk.physical_type != PHYSICAL[leaf]:
        raise _Refused(f"{field.name} is encrypted, has a dictionary, or another codec or type than we write")
    if any(encoding not in (RLE, _encoding(field)) for encoding in chunk.encodings):
        raise _Refused(f"{field.name} has another encoding than we write")
    if leaf != pa.string() and chunk.uncompressed > VALUE_BYTES * chunk.values + CHUNK_BYTES:
        raise _Refused(f"{chunk.values} values of {field.name} in {chunk.uncompressed} bytes")


def _check_pages(field: pa.Field, chunk: Chunk, view: memoryview) -> None:
    """The pages of a chunk have the values, bytes and encoding of which the footer speaks."""
    values = size = 0
    for number, page in enumerate(read_pages(view, chunk.first_page, chunk.first_page + chunk.compressed)):
        values, size = values + page.values, size + page.header + page.uncompressed
        if number >= PAGES + chunk.uncompressed // PAGE_BYTES:
            raise _Refused(f"{field.name} has more than {number} pages")
        if page.encoding != _encoding(field):
            raise _Refused(f"{field.name} has a page of another encoding than we write")
    if (values, size) != (chunk.values, chunk.uncompressed):
        raise _Refused(f"the pages of {field.name} are not those of which the footer speaks")


def _encoding(field: pa.Field) -> int:
    return BYTE_STREAM_SPLIT if pa.types.is_list(field.type) else PLAIN
