"""Parquet files that lie: a valid file taken apart into its Thrift structs, changed, and put together again.

Footer and page headers are kept as the compact protocol has them, field by field, so that any of them can be given any
value while the file stays well formed: a reader meets the lie and not a syntax error.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from common.parquet import encode
from tests.common.rows import make_table

TRUE, FALSE, BYTE, INT16, INT32, INT64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
INTEGERS = (INT16, INT32, INT64)

SCHEMA, NUM_ROWS, ROW_GROUPS, KEY_VALUES, ENCRYPTION = 2, 3, 4, 5, 8  # fields of the footer
GROUP_COLUMNS, GROUP_ROWS = 1, 3  # of a row group
CHUNK_META = 3  # of a column chunk
META_ENCODINGS, META_CODEC, META_VALUES, META_UNCOMPRESSED, META_COMPRESSED, META_DATA_PAGE = 2, 4, 5, 6, 7, 9
META_SIZES = 16  # how often each level stands there
PAGE_TYPE, PAGE_UNCOMPRESSED, PAGE_COMPRESSED, PAGE_CRC, PAGE_DATA = 1, 2, 3, 4, 5  # of a page header
DATA_VALUES, DATA_ENCODING = 1, 2  # of the data page in it


@dataclass
class Field:
    """One field of a struct: its type in the compact protocol and its value."""

    kind: int
    value: Any


Struct = dict[int, Field]


@dataclass
class ForgedPage:
    """A page: its header and its body as stored."""

    header: Struct
    body: bytes

    def plain(self) -> bytes:
        """The body, decompressed."""
        return pa.decompress(self.body, self.header[PAGE_UNCOMPRESSED].value, codec="zstd", asbytes=True)

    def store(self, plain: bytes) -> None:
        """Put another body into the page, with the sizes and the checksum that belong to it."""
        self.body = pa.compress(plain, codec="zstd", asbytes=True)
        self.header[PAGE_UNCOMPRESSED].value = len(plain)
        self.sign()

    def sign(self) -> None:
        """Make compressed size and checksum those of the body."""
        self.header[PAGE_COMPRESSED].value = len(self.body)
        crc = zlib.crc32(self.body)
        self.header[PAGE_CRC].value = crc - (1 << 32) if crc >= 1 << 31 else crc


@dataclass
class Forgery:
    """A Parquet file taken apart."""

    footer: Struct
    chunks: list[list[ForgedPage]]
    """The pages of every column chunk, in the order of the file."""

    def meta(self, chunk: int) -> Struct:
        """What the footer says of a column chunk."""
        columns = [column for group in self.footer[ROW_GROUPS].value[1] for column in group[GROUP_COLUMNS].value[1]]
        return columns[chunk][CHUNK_META].value

    def settle(self) -> None:
        """Make the footer say where the pages lie, how many bytes and how many values they have."""
        at = 4
        for index, pages in enumerate(self.chunks):
            headers = [len(write_struct(page.header)) for page in pages]
            compressed = sum(headers) + sum(len(page.body) for page in pages)
            meta = self.meta(index)
            meta[META_DATA_PAGE].value = at
            meta[META_COMPRESSED].value = compressed
            meta[META_UNCOMPRESSED].value = sum(headers) + sum(p.header[PAGE_UNCOMPRESSED].value for p in pages)
            meta[META_VALUES].value = sum(p.header[PAGE_DATA].value[DATA_VALUES].value for p in pages)
            at += compressed

    def data(self) -> bytes:
        """The file."""
        body = b"".join(write_struct(page.header) + page.body for pages in self.chunks for page in pages)
        footer = write_struct(self.footer)
        return b"PAR1" + body + footer + struct.pack("<I", len(footer)) + b"PAR1"

    def numbers(self) -> Iterator[tuple[Any, Any]]:
        """Every value of footer and page headers, as (container, key)."""
        yield from _values(self.footer)
        for pages in self.chunks:
            for page in pages:
                yield from _values(page.header)


def take_apart(data: bytes) -> Forgery:
    """The file `data`, whose chunks must lie in the order of the footer, without dictionaries."""
    (length,) = struct.unpack("<I", data[-8:-4])
    footer, _ = read_struct(data, len(data) - 8 - length)
    forgery = Forgery(footer, [])
    for index in range(sum(len(group[GROUP_COLUMNS].value[1]) for group in footer[ROW_GROUPS].value[1])):
        meta, pages = forgery.meta(index), []
        at = meta[META_DATA_PAGE].value
        stop = at + meta[META_COMPRESSED].value
        while at < stop:
            header, at = read_struct(data, at)
            size = header[PAGE_COMPRESSED].value
            pages.append(ForgedPage(header, data[at : at + size]))
            at += size
        forgery.chunks.append(pages)
    return forgery


def forged(change: Callable[[Forgery], object]) -> bytes:
    """A valid shard of four rows, changed."""
    forgery = take_apart(encode(make_table(4)))
    change(forgery)
    return forgery.data()


def levels(*runs: tuple[int, int]) -> bytes:
    """Repetition or definition levels, at most 255, from their runs: (level, how often)."""
    body = b"".join(varint(count << 1) + bytes([level]) for level, count in runs)
    return struct.pack("<I", len(body)) + body


def read_struct(data: bytes, at: int) -> tuple[Struct, int]:
    """The struct at `at`, and where it ends."""
    fields: Struct = {}
    key = 0
    while data[at]:
        step, kind = data[at] >> 4, data[at] & 15
        at += 1
        if step:
            key += step
        else:
            key, at = _read(data, at, INT16)
        if kind in (TRUE, FALSE):
            fields[key] = Field(TRUE, kind == TRUE)
            continue
        value, at = _read(data, at, kind)
        fields[key] = Field(kind, value)
    return fields, at + 1


def write_struct(fields: Struct) -> bytes:
    """The struct in the compact protocol; integers beyond 64 bits are cut."""
    out, last = bytearray(), 0
    for key, field in sorted(fields.items()):
        kind = (TRUE if field.value else FALSE) if field.kind == TRUE else field.kind
        step = key - last
        out += bytes([step << 4 | kind]) if 0 < step < 16 else bytes([kind]) + _zigzag(key)
        if field.kind != TRUE:
            out += _write(field.kind, field.value)
        last = key
    return bytes(out) + b"\0"


def varint(value: int) -> bytes:
    """An unsigned number, seven bits a byte."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def _zigzag(value: int) -> bytes:
    return varint(((value << 1) ^ (value >> 63)) & (1 << 64) - 1)


def _varint_at(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def _read(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in INTEGERS:
        value, at = _varint_at(data, at)
        return (value >> 1) ^ -(value & 1), at
    if kind == BYTE:
        return data[at], at + 1
    if kind == DOUBLE:
        return data[at : at + 8], at + 8
    if kind == BINARY:
        size, at = _varint_at(data, at)
        return data[at : at + size], at + size
    if kind == STRUCT:
        return read_struct(data, at)
    assert kind in (LIST, SET), kind
    size, inner = data[at] >> 4, data[at] & 15
    at += 1
    if size == 15:
        size, at = _varint_at(data, at)
    items = []
    for _ in range(size):
        item, at = _read(data, at, inner)
        items.append(item)
    return (inner, items), at


def _write(kind: int, value: Any) -> bytes:
    if kind in INTEGERS:
        return _zigzag(value)
    if kind == BYTE:
        return bytes([value & 255])
    if kind == DOUBLE:
        return value
    if kind == BINARY:
        return varint(len(value)) + value
    if kind == STRUCT:
        return write_struct(value)
    inner, items = value
    head = bytes([len(items) << 4 | inner]) if len(items) < 15 else bytes([15 << 4 | inner]) + varint(len(items))
    return head + b"".join(_write(inner, item) for item in items)


def _values(fields: Struct) -> Iterator[tuple[Any, Any]]:
    for key, field in fields.items():
        yield fields, key
        if field.kind == STRUCT:
            yield from _values(field.value)
        elif field.kind in (LIST, SET):
            for index, item in enumerate(field.value[1]):
                yield field.value[1], index
                if field.value[0] == STRUCT:
                    yield from _values(item)
