"""Verified shards kept on this machine, so that the second epoch reads them from a disk and not from the store.

Named by their hash and verified again at every read; the least recently used go when there are too many bytes.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

from common.canonical import sha256
from common.errors import LopdError
from common.local_cache import cache_dir, cache_limit
from common.local_files import PARTIAL
from common.storage import Store

ABANDONED_S = 24 * 3600.0
"""Age of a half-written shard that nobody writes any more."""


def cached_shard(digest: str) -> bytes | None:
    """The shard with this sha256; None when it is not kept, or no more what it was."""
    file = _folder() / f"{digest}.parquet"
    try:
        data = file.read_bytes()
        os.utime(file)
    except OSError:
        return None
    return data if sha256(data) == digest else None


def keep_shard(digest: str, data: bytes) -> None:
    """Keep a verified shard; a disk that is full or cannot be written costs the copy and not the read.

    Nor does another process that makes room at the same time.
    """
    limit = cache_limit()
    with suppress(LopdError, OSError):
        Store(str(_folder())).put(f"{digest}.parquet", data)
        _make_room(limit)


def _make_room(limit: int) -> None:
    """Remove what killed readers left half-written, and the least recently used until `limit` bytes hold the rest."""
    for file in _folder().glob(f".*{PARTIAL}"):
        if time.time() - file.stat().st_mtime > ABANDONED_S:
            file.unlink(missing_ok=True)
    files = [(file.stat(), file) for file in _folder().glob("*.parquet")]
    surplus = sum(stat.st_size for stat, _ in files) - limit
    for stat, file in sorted(files, key=lambda entry: entry[0].st_mtime):
        if surplus <= 0:
            return
        file.unlink(missing_ok=True)
        surplus -= stat.st_size


def _folder() -> Path:
    return cache_dir() / "shards"
