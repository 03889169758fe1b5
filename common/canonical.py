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
        value = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"not valid JSON: {error}", where=where, fix=fix) from None
    if not isinstance(value, dict):
        raise DataError("not a JSON object", where=where, fix=fix)
    return value


def parse_record(model: type[Record], data: bytes, where: str, fix: str = "") -> Record:
    """The record in `data`. Raises `DataError` with the key that does not fit."""
    try:
        return model.model_validate(parse_object(data, where, fix))
    except ValidationError as error:
        raise DataError(first_problem(error), where=where, fix=fix) from None


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints: `key: what is wrong with it`."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
