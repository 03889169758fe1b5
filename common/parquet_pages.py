"""The page headers of a Parquet file, read without decoding a page.

A footer can say little while the pages behind it say much: a page header alone decides how many bytes the decoder
allocates and how many values it makes. The headers we write hold a few 32-bit numbers in Thrift's compact protocol
(https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md), so anything else is refused here
instead of understood.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_HEADER = 128
"""Bytes of a page header at most; those we write, without statistics, take about 30."""
DATA_PAGE = 0
TRUE, FALSE, INT32, STRUCT = 1, 2, 5, 12  # the types of the compact protocol that occur


@dataclass(frozen=True)
class Page:
    """One data page, by its header."""

    header: int  # bytes of the header itself
    compressed: int  # bytes that follow the header
    uncompressed: int  # bytes once decompressed
    values: int  # entries, nulls included
    encoding: int


class BadPage(ValueError):
    """A page header that we do not write."""


def pages(data: memoryview, start: int, stop: int) -> Iterator[Page]:
    """The data pages that fill `data[start:stop]`, in order.

    Raises:
        BadPage: one is of another kind, has no checksum, or does not end where it must.
    """
    at = start
    while at < stop:
        fields, length = _struct(data[at : min(at + MAX_HEADER, stop)], 0, depth=3)
        kind, uncompressed, compressed, crc, data_page = (fields.get(key) for key in (1, 2, 3, 4, 5))
        if kind != DATA_PAGE or not isinstance(data_page, dict):
            raise BadPage("a page that is no plain data page")
        if crc is None:
            raise BadPage("a page without checksum")
        page = Page(length, _size(compressed), _size(uncompressed), _size(data_page.get(1)), _size(data_page.get(2)))
        at += page.header + page.compressed
        if at > stop:
            raise BadPage("a page that goes beyond its column")
        yield page


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BadPage("a page header with an impossible number")
    return value


def _struct(data: memoryview, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """The fields of the struct at `at`, by their ids, which must ascend; and where it ends."""
    fields: dict[int, Any] = {}
    key = 0
    while True:
        byte, at = _byte(data, at)
        if byte == 0:
            return fields, at
        step, kind = byte >> 4, byte & 15
        if step == 0:
            raise BadPage("a page header of another layout")
        key += step
        if kind in (TRUE, FALSE):
            fields[key] = kind == TRUE
        elif kind == INT32:
            fields[key], at = _int32(data, at)
        elif kind == STRUCT and depth > 1:
            fields[key], at = _struct(data, at, depth - 1)
        else:
            raise BadPage("a page header with a field that we do not write")


def _int32(data: memoryview, at: int) -> tuple[int, int]:
    """A zigzag varint. Longer ones than 32 bits are refused, since decoders cut them differently."""
    value = 0
    for shift in range(0, 35, 7):
        byte, at = _byte(data, at)
        value |= (byte & 127) << shift
        if byte < 128:
            if value >= 1 << 32:
                break
            return (value >> 1) ^ -(value & 1), at
    raise BadPage("a page header with a number beyond 32 bits")


def _byte(data: memoryview, at: int) -> tuple[int, int]:
    if at >= len(data):
        raise BadPage("a page header that does not end")
    return data[at], at + 1
