"""JSON as it is stored and hashed here: one byte string per value; what is malformed is one line that says where."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from common.config import Frozen
from common.errors import DataError

Record = TypeVar("Record", bound=Frozen)


def canonical(value: Mapping[str, Any]) -> bytes:
    """One byte string per value: sorted keys, no spare blanks, UTF-8."""
    return (
        json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"
    ).encode()


def sha256(data: bytes) -> str:
    """The hash by which bytes are named, in hex."""
    return hashlib.sha256(data).hexdigest()


def parse_object(data: bytes, where: str, fix: str = "") -> dict[str, Any]:
    """The JSON object in `data`. Raises `DataError` when it is none."""
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or a number of thousands of digits
        raise DataError(f"not valid JSON: {error}", where=where, fix=fix) from None
    if not isinstance(value, dict):
        raise DataError("not a JSON object", where=where, fix=fix)
    return value


def seal(record: Mapping[str, Any]) -> bytes:
    """The record as it is stored: with a key `seal`, the hash of all the rest, by which a flipped bit shows."""
    return canonical({**record, "seal": sha256(canonical(record))})


def unseal(data: bytes, where: str, fix: str = "") -> dict[str, Any]:
    """The record that `seal` made `data` of. Raises `DataError` when it was altered by as much as a blank."""
    record = parse_object(data, where, fix)
    record.pop("seal", None)
    try:
        intact = seal(record) == data
    except (ValueError, RecursionError):  # what `canonical` cannot write, `seal` has not written
        intact = False
    if not intact:
        raise DataError("the record was altered: it does not fit its seal", where=where, fix=fix)
    return record


def as_record(model: type[Record], value: Mapping[str, Any], where: str, fix: str = "") -> Record:
    """`value` as a record. Raises `DataError` with the key that does not fit."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise DataError(first_problem(error), where=where, fix=fix) from None


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints: `key: what is wrong with it`."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")
