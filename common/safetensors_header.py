"""The header of a safetensors file, read without torch and believed only where it fits the file.

Format: 8 bytes little-endian length, a JSON object, then the data. The object holds for each tensor its dtype, its
shape and where its bytes lie, counted from the header's end; together the tensors fill the data without gap or overlap.
"""

import math
import struct
from typing import Annotated, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from common.canonical import first_problem
from common.errors import DataError

LONGEST = 100_000_000
"""Bytes of the longest header that any reader of the format takes."""
MOST_DIMENSIONS = 64
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Bits of an element. A dtype that came to the format later is taken at the header's word."""
REPAIR = "Fetch the model again"


class TensorEntry(BaseModel):
    """One tensor as the header has it."""

    model_config = ConfigDict(strict=True, frozen=True)

    dtype: str
    shape: Annotated[list[NonNegativeInt], Field(max_length=MOST_DIMENSIONS)]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return self.data_offsets[1] - self.data_offsets[0]


class _Header(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, TensorEntry]

    about: dict[str, str] | None = Field(None, alias="__metadata__")


def read_header(stream: BinaryIO, size: int, where: str) -> tuple[bytes, dict[str, TensorEntry]]:
    """Read up to the first byte of data.

    Args:
        stream: a file of `size` bytes, at its beginning.

    Returns:
        The bytes read, and the tensors in the order in which their data follows.

    Raises:
        DataError: the header is malformed, or is not the header of this file.
    """
    prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(LONGEST, size - 8):
        raise _malformed("it is cut short, or no safetensors file", where)
    text = stream.read(length)
    try:
        entries = _Header.model_validate_json(text).__pydantic_extra__
    except ValidationError as error:
        raise _malformed(shown(first_problem(error)), where) from None
    ordered = dict(sorted(entries.items(), key=lambda item: item[1].data_offsets))
    end = 0
    for name, entry in ordered.items():
        if entry.data_offsets[0] != end or entry.size < 0:
            raise _malformed(f"tensor {shown(name)} does not begin where the one before ends", where)
        _require_size(name, entry, where)
        end = entry.data_offsets[1]
    if end != size - 8 - length:
        raise _malformed(f"its tensors have {end} bytes, the file holds {size - 8 - length}", where)
    return prefix + text, ordered


def shown(text: str) -> str:
    """A text from a file, fit for one line of a message."""
    return ascii(text if len(text) <= 200 else f"{text[:200]}...")[1:-1]


def _require_size(name: str, entry: TensorEntry, where: str) -> None:
    bits = math.prod(entry.shape) * BITS.get(entry.dtype, 0)
    if entry.dtype in BITS and bits != 8 * entry.size:
        raise _malformed(f"tensor {shown(name)} has {entry.size} bytes, which is not what its shape takes", where)


def _malformed(what: str, where: str) -> DataError:
    return DataError(f"malformed safetensors file: {what}", where=where, fix=REPAIR)
