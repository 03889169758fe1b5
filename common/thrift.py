"""Thrift's compact protocol, as much of it as Parquet's metadata needs, on bytes that nobody vouches for.

https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md. Only fields that are asked for are
kept, so that time and memory stay within the length of the bytes. What one decoder may understand otherwise than the
next (numbers that overflow, fields that stand twice) is refused.
"""

from collections.abc import Mapping
from typing import Any

TRUE, FALSE, BYTE, INT16, INT32, INT64, DOUBLE, BINARY, LIST, STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 12
BITS = {INT16: 16, INT32: 32, INT64: 64}
MAX_DEPTH = 12
"""Structs and lists within each other; Parquet's metadata needs 7."""
Shape = Mapping[int, "Shape"]
"""Fields to keep, by their ids, each with those to keep below it; `{}` for a plain value."""


class Malformed(ValueError):
    """Bytes that are not in the compact protocol, or not in a way that every decoder understands alike."""


def read_struct(data: memoryview, at: int, shape: Shape, depth: int = 0) -> tuple[dict[int, Any], int]:
    """The wanted fields of the struct that begins at `at`, and where it ends. Raises `Malformed`."""
    if depth > MAX_DEPTH:
        raise Malformed("metadata nested too deeply")
    fields: dict[int, Any] = {}
    key = 0
    while True:
        byte, at = _byte(data, at)
        if byte == 0:
            return fields, at
        step, kind = byte >> 4, byte & 15
        if step == 0:
            raise Malformed("metadata with fields out of order")
        key += step
        wanted = shape.get(key)
        value, at = (kind == TRUE, at) if kind in (TRUE, FALSE) else _value(data, at, kind, wanted, depth)
        if wanted is not None:
            fields[key] = value


def _value(data: memoryview, at: int, kind: int, shape: Shape | None, depth: int) -> tuple[Any, int]:
    if kind in BITS:
        return _integer(data, at, BITS[kind])
    if kind in (BYTE, TRUE, FALSE):
        return _byte(data, at)
    if kind == DOUBLE:
        return None, _end(data, at, 8)
    if kind == BINARY:
        size, at = _varint(data, at)
        end = _end(data, at, size)
        return bytes(data[at:end]) if shape is not None else b"", end
    if kind == STRUCT:
        return read_struct(data, at, shape or {}, depth + 1)
    if kind == LIST:
        return _list(data, at, shape, depth + 1)
    raise Malformed("metadata with a value of another type")


def _list(data: memoryview, at: int, shape: Shape | None, depth: int) -> tuple[list[Any], int]:
    head, at = _byte(data, at)
    size, kind = head >> 4, head & 15
    if size == 15:
        size, at = _varint(data, at)
    _end(data, at, size)  # an item has a byte at least
    if depth > MAX_DEPTH:
        raise Malformed("metadata nested too deeply")
    items = []
    for _ in range(size):
        item, at = _value(data, at, kind, shape, depth)
        if shape is not None:
            items.append(item)
    return items, at


def _integer(data: memoryview, at: int, bits: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    if value >> bits:
        raise Malformed("metadata with a number that overflows")
    return (value >> 1) ^ -(value & 1), at


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte, at = _byte(data, at)
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise Malformed("metadata with a number that overflows")


def _byte(data: memoryview, at: int) -> tuple[int, int]:
    end = _end(data, at, 1)
    return data[at], end


def _end(data: memoryview, at: int, size: int) -> int:
    if size > len(data) - at:
        raise Malformed("metadata that does not end")
    return at + size
