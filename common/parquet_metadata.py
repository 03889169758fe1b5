"""What a Parquet file says of itself, in its footer and before every page, read without decoding a page.

pyarrow shows a footer too, but a forged one ends the process: its accessors let C++ exceptions escape (an unknown
codec is enough). And a footer can say little while the pages behind it say much: a page header alone decides how many
bytes the decoder allocates and how many values it makes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common.thrift import Malformed, Shape, read_struct

MAX_HEADER = 128
"""Bytes of a page header at most; those we write, without statistics, take about 30."""
DATA_PAGE = 0
MAGIC = b"PAR1"
TRAILER = 8
"""Bytes behind the footer: its length and the magic."""
# Fields by their ids in https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
CHUNK: Shape = {1: {}, 3: {1: {}, 2: {}, 4: {}, 5: {}, 6: {}, 7: {}, 9: {}, 11: {}}, 8: {}, 9: {}}
FOOTER: Shape = {3: {}, 4: {1: CHUNK, 3: {}}, 8: {}, 9: {}}
PAGE: Shape = {1: {}, 2: {}, 3: {}, 4: {}, 5: {1: {}, 2: {}}}


@dataclass(frozen=True)
class Chunk:
    """One column of one row group."""

    physical_type: int
    encodings: tuple[int, ...]
    codec: int
    values: int  # entries, nulls included
    uncompressed: int  # bytes, page headers included
    compressed: int  # bytes, page headers included
    first_page: int  # offset in the file
    plain: bool
    """Whether it lies in this file, unencrypted and without a dictionary."""


@dataclass(frozen=True)
class RowGroup:
    """Rows that are stored together."""

    rows: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Footer:
    """What the file says of all its pages."""

    start: int  # offset in the file
    rows: int
    groups: tuple[RowGroup, ...]
    encrypted: bool


@dataclass(frozen=True)
class Page:
    """One data page, by its header."""

    header: int  # bytes of the header itself
    compressed: int  # bytes that follow the header
    uncompressed: int  # bytes once decompressed
    values: int  # entries, nulls included
    encoding: int


def read_footer(data: bytes) -> Footer:
    """The footer of the file. Raises `Malformed`."""
    if len(data) < len(MAGIC) + TRAILER or data[:4] != MAGIC or data[-4:] != MAGIC:
        raise Malformed("no Parquet file, or an encrypted one")
    start = len(data) - TRAILER - int.from_bytes(data[-TRAILER:-4], "little")
    if start < len(MAGIC):
        raise Malformed("a footer that is longer than the file")
    fields, end = read_struct(memoryview(data), start, FOOTER)
    if end != len(data) - TRAILER:
        raise Malformed("a footer that does not end where it must")
    groups = tuple(_row_group(group) for group in _items(fields, 4))
    return Footer(start, _number(fields, 3), groups, encrypted=8 in fields or 9 in fields)


def read_pages(data: memoryview, start: int, stop: int) -> Iterator[Page]:
    """The data pages that fill `data[start:stop]`, in order.

    Raises:
        Malformed: one is of another kind, has no checksum, or does not end where it must.
    """
    at = start
    while at < stop:
        fields, length = read_struct(data[at : min(at + MAX_HEADER, stop)], 0, PAGE)
        data_page = fields.get(5)
        if fields.get(1) != DATA_PAGE or not isinstance(data_page, dict):
            raise Malformed("a page that is no plain data page")
        if 4 not in fields:
            raise Malformed("a page without checksum")
        page = Page(length, _number(fields, 3), _number(fields, 2), _number(data_page, 1), _number(data_page, 2))
        at += page.header + page.compressed
        if at > stop:
            raise Malformed("a page that goes beyond its column")
        yield page


def _row_group(fields: Any) -> RowGroup:
    return RowGroup(_number(fields, 3), tuple(_chunk(chunk) for chunk in _items(fields, 1)))


def _chunk(fields: Any) -> Chunk:
    if not isinstance(fields, dict) or not isinstance(fields.get(3), dict):
        raise Malformed("a column without metadata")
    meta = fields[3]
    return Chunk(
        physical_type=_number(meta, 1),
        encodings=tuple(_items(meta, 2)),
        codec=_number(meta, 4),
        values=_number(meta, 5),
        uncompressed=_number(meta, 6),
        compressed=_number(meta, 7),
        first_page=_number(meta, 9),
        plain=not {1, 8, 9} & {*fields} and 11 not in meta,
    )


def _number(fields: Any, key: int) -> int:
    value = fields.get(key) if isinstance(fields, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Malformed("metadata with an impossible number, or without one")
    return value


def _items(fields: Any, key: int) -> list[Any]:
    value = fields.get(key) if isinstance(fields, dict) else None
    if not isinstance(value, list):
        raise Malformed("metadata without a list that it must have")
    return value
