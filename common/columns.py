"""Values of rows as Arrow columns, and back; what a column cannot hold is refused, never wrapped or cut."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import pyarrow as pa

from common.errors import DataError


class Named(Protocol):
    """A row, which has a name for messages."""

    @property
    def uid(self) -> str: ...


def leaf_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values, below all its lists."""
    while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind


def plain_column(rows: Sequence[Named], name: str, kind: pa.DataType) -> pa.Array:
    """An attribute of the rows that is one value each."""
    values = [getattr(row, name) for row in rows]
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError):
        for row, value in zip(rows, values, strict=True):
            with _fitting(name, row):
                pa.array([value], kind)
        raise


def list_column(rows: Sequence[Named], name: str, kind: pa.DataType, width: int = 0) -> pa.Array:
    """Arrays, shape (n,) or (n, width), as one Arrow list array; None becomes null."""
    given = [getattr(row, name) for row in rows]
    leaf = leaf_type(kind)
    dtype = leaf.to_pandas_dtype()
    try:
        values = [None if value is None else _exact(np.asarray(value), dtype, width) for value in given]
    except (OverflowError, TypeError, ValueError):
        for row, value in zip(rows, given, strict=True):
            with _fitting(name, row):
                if value is not None:
                    _exact(np.asarray(value), dtype, width)
        raise
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([0 if value is None else len(value) for value in values], out=offsets[1:])
    present = [value.reshape(-1) for value in values if value is not None]
    flat: pa.Array = pa.array(np.concatenate(present) if present else np.empty(0, dtype), leaf)
    if width:
        flat = pa.FixedSizeListArray.from_arrays(flat, type=kind.value_type)
    missing = pa.array([value is None for value in values], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=kind, mask=missing)


@contextmanager
def _fitting(name: str, row: Named) -> Iterator[None]:
    """A value that its column cannot hold, as a `DataError` with the row."""
    try:
        yield
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError) as error:
        raise DataError(f"{name} does not fit its column: {error}", where=f"row {ascii(row.uid)[1:-1]}") from None


def _exact(given: np.ndarray, dtype: type[np.generic], width: int) -> np.ndarray:
    """`given` as (n,) or (n, width) values of `dtype`, each the number it was, to the type's precision."""
    if given.ndim != (2 if width else 1) or (width and given.shape[1] != width):
        raise ValueError(f"it has the shape {given.shape}" + (f", not (tokens, {width})" if width else ""))
    if given.dtype == dtype or not given.size:
        return given if given.dtype == dtype else given.astype(dtype)
    if given.dtype.kind not in ("iu" if dtype is np.int32 else "iuf"):
        raise TypeError(f"it holds {given.dtype} values")
    with np.errstate(over="ignore"):
        cast = given.astype(dtype)
    changed = (cast != given) if dtype is np.int32 else (np.isinf(cast) & ~np.isinf(given))
    if changed.any():
        raise ValueError(f"{given[changed][0]} is beyond {np.dtype(dtype)}")
    return cast


def arrays_of(column: pa.ChunkedArray, width: int = 0) -> list[np.ndarray | None]:
    """The lists of a column as arrays, shape (n,) or (n, width); null becomes None."""
    values: list[np.ndarray | None] = []
    for chunk in column.chunks:
        leaf = chunk.values.values if width else chunk.values
        flat = leaf.to_numpy(zero_copy_only=False)
        flat = flat.reshape(-1, width) if width else flat
        offsets = chunk.offsets.to_numpy().tolist()  # Python's numbers slice faster than numpy's
        spans = zip(chunk.is_valid().to_pylist(), offsets, offsets[1:], strict=False)
        values += [flat[start:stop] if valid else None for valid, start, stop in spans]
    return values
