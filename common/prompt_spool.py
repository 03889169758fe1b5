"""Rows on this machine's disk, kept under their hash and read a few at a time.

However many there are, memory holds some hundred of them. The file is read, not mapped: pages of a mapping would be
counted as memory of every process that reads it. Workers on one box share the file; nobody writes to it once it has its
name, and who did not write it himself compares it with the hash before he trusts it.
"""

import hashlib
import itertools
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import pyarrow as pa

from common.local_cache import cache_dir
from common.local_files import PARTIAL
from common.storage_errors import explain

SCHEMA = pa.schema([("row", pa.binary())])
ROWS = 256
"""In every record batch but the last; what is read at once."""
ABANDONED_S = 24 * 3600.0
"""Age of a half-written file that nobody writes any more."""
UNUSED_S = 30 * 24 * 3600.0
"""Age of one that nobody opens any more; it can be had again from its source."""


class Spool:
    """Rows in a file, by number. For any number of threads.

    Attributes:
        sha256: of all rows, one after another.
    """

    def __init__(self, file: Path) -> None:
        self.sha256 = file.stem
        self._reader = pa.ipc.open_file(pa.OSFile(str(file)))
        self._lock = threading.Lock()
        batches = self._reader.num_record_batches
        self._held = -1, list[bytes]()
        self._length = (batches - 1) * ROWS + len(self._batch(batches - 1)) if batches else 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        for number in range(self._reader.num_record_batches):
            yield from self._batch(number)

    def read(self, start: int, stop: int) -> list[bytes]:
        """Rows `start` to `stop`, which must be there."""
        first, end = start // ROWS, -(-stop // ROWS)
        rows = [row for number in range(first, end) for row in self._batch(number)]
        return rows[start - first * ROWS : stop - first * ROWS]

    def _batch(self, number: int) -> list[bytes]:
        with self._lock:
            if self._held[0] != number:
                self._held = number, self._reader.get_batch(number).column(0).to_pylist()
            return self._held[1]


def spool(rows: Iterable[bytes]) -> Spool:
    """Write rows as they come, in memory that does not grow; the file appears whole, or not at all.

    Raises:
        StorageError: the disk is full or cannot be written.
        LopdError: whatever making the rows raised.
    """
    digest, left = hashlib.sha256(), iter(rows)
    with scratch_file() as partial:
        try:
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as file:
                while some := list(itertools.islice(left, ROWS)):
                    digest.update(b"".join(some))
                    file.write_batch(pa.record_batch([pa.array(some, pa.binary())], schema=SCHEMA))
            kept = partial.with_name(f"{digest.hexdigest()}.arrow")
            os.replace(partial, kept)
        except OSError as error:
            raise explain(error, "write", str(partial.parent)) or error from None
    return Spool(kept)


def spooled(sha256: str) -> Spool | None:
    """The rows with this hash, read once to compare; None when they are not here, or no more what they were."""
    kept = _folder() / f"{sha256}.arrow"
    try:
        rows = Spool(kept)
        digest = hashlib.sha256()
        for row in rows:
            digest.update(row)
        os.utime(kept)
    except (OSError, pa.ArrowException):
        return None
    return rows if digest.hexdigest() == sha256 else None


def forget(rows: Spool) -> None:
    """Remove the file; `rows` can still be read."""
    (_folder() / f"{rows.sha256}.arrow").unlink(missing_ok=True)


@contextmanager
def scratch_file() -> Iterator[Path]:
    """A path for a file that is gone at the end. Those that others left behind go too.

    Raises:
        LopdError: the cache folder cannot be made.
    """
    try:
        _folder().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, "write", str(_folder())) or error from None
    _remove_older(f".*{PARTIAL}", ABANDONED_S)
    for pattern in ("*.arrow", "*.json"):
        _remove_older(pattern, UNUSED_S)
    path = _folder() / f".{uuid4().hex}{PARTIAL}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _remove_older(pattern: str, seconds: float) -> None:
    for file in _folder().glob(pattern):
        with suppress(OSError):  # another process that removes it too, or the owner of another's file
            if time.time() - file.stat().st_mtime > seconds:
                file.unlink(missing_ok=True)


def _folder() -> Path:
    return cache_dir() / "prompts"
