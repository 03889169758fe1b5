"""Where every row of a dataset lies and how long it is, known without holding a row.

Parquet keeps the lengths of lists among their values, so they cost one reading of every shard. They are kept beside the
shards in the local cache, 16 bytes a row under the hash of the manifest, and the next run on this machine has them at
once.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

from common.canonical import sha256
from common.errors import LopdError
from common.local_cache import cache_dir
from common.records import Commit
from common.storage import Store

LENGTH_COLUMNS = ("prompt_id", "prompt_ids", "completion_ids")
"""The columns that `lengths_in` reads."""
KEPT = np.dtype([("prompt", "<i4"), ("completion", "<i4"), ("prompt_key", "<u8")])
"""A row in the cache's file, which begins with the sha256 of all of them."""
DIGEST_BYTES = 32


@dataclass(frozen=True)
class RowLengths:
    """Where every row lies and how long it is; one entry a row, in dataset order."""

    shard: np.ndarray  # (rows,) int32
    row: np.ndarray  # (rows,) int32, index within the shard
    prompt: np.ndarray  # (rows,) int32 tokens
    completion: np.ndarray  # (rows,) int32 tokens
    prompt_key: np.ndarray  # (rows,) uint64, the first bytes of the sha256 of the prompt_id: the same in every dataset

    def __len__(self) -> int:
        return len(self.row)

    @property
    def total(self) -> np.ndarray:
        """(rows,) int64, tokens of prompt and completion."""
        return self.prompt.astype(np.int64) + self.completion

    def take(self, which: np.ndarray) -> "RowLengths":
        """Some of the rows, by their numbers or a mask."""
        return RowLengths(*(getattr(self, field.name)[which] for field in fields(self)))


def lengths_in(shard: int, table: pa.Table) -> RowLengths:
    """The rows of one shard, from its `LENGTH_COLUMNS`."""
    prompt, completion = (
        np.diff(table[name].combine_chunks().offsets.to_numpy()).astype(np.int32)
        for name in ("prompt_ids", "completion_ids")
    )
    keys = [hashlib.sha256(name.encode()).digest()[:8] for name in table["prompt_id"].to_pylist()]
    rows = np.arange(len(prompt), dtype=np.int32)
    return RowLengths(np.full_like(rows, shard), rows, prompt, completion, np.frombuffer(b"".join(keys), "<u8"))


def joined(parts: Sequence[RowLengths]) -> RowLengths:
    """The rows of several parts, one after another."""
    return RowLengths(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(RowLengths)))


def kept_lengths(manifest_sha256: str, commits: Sequence[Commit]) -> RowLengths | None:
    """What this machine keeps of the dataset; None when it keeps nothing, or something that its commits do not say."""
    try:
        data = (cache_dir() / "lengths" / manifest_sha256).read_bytes()
    except OSError:
        return None
    digest, kept = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    counts = np.array([commit.rows for commit in commits])
    if bytes.fromhex(sha256(kept)) != digest or len(kept) != counts.sum() * KEPT.itemsize:
        return None
    rows = np.frombuffer(kept, KEPT)
    starts = np.cumsum(counts) - counts
    for name, said in (("prompt", "prompt_tokens"), ("completion", "tokens")):
        sums = np.diff(np.cumsum(np.append(0, rows[name].astype(np.int64)))[np.append(starts, len(rows))])
        if sums.tolist() != [getattr(commit, said) for commit in commits]:
            return None
    shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    row = (np.arange(len(rows)) - np.repeat(starts, counts)).astype(np.int32)
    return RowLengths(shard, row, *(rows[name].copy() for name in ("prompt", "completion", "prompt_key")))


def keep_lengths(manifest_sha256: str, lengths: RowLengths) -> None:
    """Keep them for the next run; a disk that is full or cannot be written costs the copy and nothing else."""
    rows = np.empty(len(lengths), KEPT)
    for name in ("prompt", "completion", "prompt_key"):
        rows[name] = getattr(lengths, name)
    data = rows.tobytes()
    with suppress(LopdError, OSError):
        Store(str(cache_dir() / "lengths")).put(manifest_sha256, bytes.fromhex(sha256(data)) + data)
