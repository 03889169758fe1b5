"""Checks of one column of rollouts, each naming the first row that breaks the contract."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from common.errors import DataError

MAX_LOGPROB = 1e-4
"""Highest log-prob accepted, in nats: rounding may lift a certain token a little above 0."""


def lengths_of(table: pa.Table, name: str, uids: Sequence[str], where: str) -> np.ndarray:
    column = table[name].combine_chunks()
    refuse(column.is_null().to_numpy(zero_copy_only=False), uids, f"{name} is missing", where)
    return np.diff(column.offsets.to_numpy())  # (rows,)


def _leaf(table: pa.Table, name: str, lengths: np.ndarray, uids: Sequence[str], where: str) -> np.ndarray:
    """All values of a list column one after another; a null is refused at every level, for flattening drops it."""
    values = table[name].combine_chunks().flatten()
    while True:
        if values.null_count:
            position = int(values.is_null().to_numpy(zero_copy_only=False).argmax())
            row = _row_of(position, lengths, len(values))
            raise DataError(f"{name} holds a null", where=f"{where}, row {uids[row]}")
        if not pa.types.is_fixed_size_list(values.type):
            return values.to_numpy(zero_copy_only=False)
        values = values.flatten()


def check_ids(
    table: pa.Table, name: str, uids: Sequence[str], vocab_size: int, where: str, expected: np.ndarray | None = None
) -> None:
    lengths = lengths_of(table, name, uids, where)
    if expected is not None:
        refuse(lengths != expected, uids, f"{name} and completion_ids differ in length", where)
    ids = _leaf(table, name, lengths, uids, where)
    bad = (ids < 0) | (ids >= vocab_size)
    if bad.any():
        row = _row_of(int(bad.argmax()), lengths, len(ids))
        raise DataError(
            f"token id {int(ids[bad.argmax()])} in {name} is outside the vocabulary of {vocab_size}",
            where=f"{where}, row {uids[row]}",
        )


def check_logprobs(table: pa.Table, name: str, expected: np.ndarray, uids: Sequence[str], where: str) -> None:
    lengths = lengths_of(table, name, uids, where)
    refuse(lengths != expected, uids, f"{name} and completion_ids differ in length", where)
    values = _leaf(table, name, lengths, uids, where)
    bad = ~np.isfinite(values) | (values > MAX_LOGPROB)
    if bad.any():
        row = _row_of(int(bad.argmax()), lengths, len(values))
        raise DataError(f"{name} holds {values[bad.argmax()]}, which is no log-prob", where=f"{where}, row {uids[row]}")


def _row_of(position: int, lengths: np.ndarray, leaves: int) -> int:
    width = leaves // max(int(lengths.sum()), 1)  # 1, or k for a top-k column
    return int(np.searchsorted(np.cumsum(lengths) * width, position, side="right"))


def refuse(bad: np.ndarray, uids: Sequence[str], what: str, where: str) -> None:
    if bad.any():
        raise DataError(what, where=f"{where}, row {uids[int(bad.argmax())]}")
