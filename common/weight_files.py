"""What a safetensors file holds, told by hashes: read once, side by side with its neighbours, and remembered.

Reading a model takes about a second a gigabyte, so each file's hashes are kept in the cache folder for as long as the
file stays as it was. The cache may vanish or rot at any time: then the files are read again.
"""

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from io import BufferedReader
from pathlib import Path
from threading import Event, Lock

from common.canonical import as_record, seal, sha256, unseal
from common.config import Frozen
from common.errors import DataError, LopdError, RetryLater, StorageError
from common.local_cache import cache_dir
from common.progress import BYTES, PATIENCE_S, Progress
from common.safetensors_header import read_header
from common.storage import Store
from common.storage_errors import explain

SETTLED_S = 2.0
"""A file younger than this is not remembered: it may be written again within one tick of its time stamps, the coarsest
of which last two seconds."""
CHUNK = 1 << 22
"""Bytes of a file in memory at a time."""
THREADS = 8
POLL_S = 0.2

log = logging.getLogger(__name__)


class FileState(Frozen):
    """What tells a file that was written since from one that was not."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    """Unlike the time above, nobody can set it: `cp -p` or `tar` may put other weights of equal size and date here."""
    inode: int


class TensorHash(Frozen):
    """One tensor and the hash of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class FileHashes(Frozen):
    """What one pass over a safetensors file tells."""

    file: FileState
    sha256: str
    tensors: dict[str, TensorHash]


def hash_files(files: Sequence[Path], label: str) -> list[FileHashes]:
    """The hashes of each file: remembered ones, else by reading it.

    Args:
        label: what the progress line says is going on.

    Raises:
        DataError: a malformed file.
        StorageError, RetryLater: a file cannot be read, or changed meanwhile.
    """
    states = {file: _state_at(file) for file in files}
    hashes = {file: known for file, state in states.items() if (known := _recall(state)) is not None}
    unread = {file: state.size for file, state in states.items() if file not in hashes}
    if unread:
        hashes |= _read_side_by_side(unread, label)
    return [hashes[file] for file in files]


class _Abandoned(Exception):
    """Another thread failed, or the user interrupted: nobody waits for this file any more."""


class _Tally:
    """Bytes read so far by all threads, and the word to stop."""

    def __init__(self) -> None:
        self.bytes, self.stop = 0, Event()
        self._lock = Lock()

    def add(self, count: int) -> None:
        if self.stop.is_set():
            raise _Abandoned
        with self._lock:
            self.bytes += count


def _read_side_by_side(sizes: Mapping[Path, int], label: str) -> dict[Path, FileHashes]:
    tally = _Tally()
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1, len(sizes))) as pool:
        futures = {file: pool.submit(_read, file, tally) for file in sizes}
        try:
            _await(futures.values(), tally, sum(sizes.values()), label)
        finally:
            tally.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    return {file: future.result() for file, future in futures.items()}


def _await(futures: Iterable[Future[FileHashes]], tally: _Tally, total: int, label: str) -> None:
    """Wait for all, or for the first error; says how far they are when it takes long."""
    if running := _still_running(futures, PATIENCE_S):
        with Progress(label, total, BYTES) as progress:
            while running:
                running = _still_running(running, POLL_S)
                new = tally.bytes - progress.done
                progress.advance(new, new)


def _still_running(futures: Iterable[Future[FileHashes]], timeout_s: float) -> set[Future[FileHashes]]:
    done, running = wait(futures, timeout_s, FIRST_EXCEPTION)
    for future in done:
        future.result()  # raises the error of one that failed
    return running


def _read(file: Path, tally: _Tally) -> FileHashes:
    began = time.time()
    try:
        with open(file, "rb") as stream:
            state = _state(file, os.fstat(stream.fileno()))
            hashes = _hash(stream, state, tally)
            if _written(_state(file, os.fstat(stream.fileno()))) != _written(state):
                raise _changed(state)
    except OSError as error:
        raise unreadable(error, file) from None
    if began - max(state.mtime_ns, state.ctime_ns) / 1e9 > SETTLED_S:
        _remember(hashes)
    return hashes


def _hash(stream: BufferedReader, state: FileState, tally: _Tally) -> FileHashes:
    """Hash the file and, in the same pass, its tensors; they follow one another from the header to the end."""
    head, entries = read_header(stream, state.size, state.path)
    whole = hashlib.sha256(head)
    tally.add(len(head))
    buffer = memoryview(bytearray(min(CHUNK, state.size)))
    tensors = {}
    for name, entry in entries.items():
        own, left = hashlib.sha256(), entry.size
        while left:
            count = stream.readinto(buffer[: min(left, len(buffer))])
            if not count:
                raise _changed(state)
            whole.update(buffer[:count])
            own.update(buffer[:count])
            tally.add(count)
            left -= count
        tensors[name] = TensorHash(dtype=entry.dtype, shape=tuple(entry.shape), sha256=own.hexdigest())
    return FileHashes(file=state, sha256=whole.hexdigest(), tensors=tensors)


def _recall(state: FileState) -> FileHashes | None:
    """What is remembered of the file as it is now."""
    place = _memory() / _key(state)
    try:
        record = unseal(place.read_bytes(), str(place))
        hashes = as_record(FileHashes, record, str(place))
    except (OSError, DataError):
        return None
    return hashes if hashes.file == state else None


def _remember(hashes: FileHashes) -> None:
    try:
        Store(str(_memory())).put(_key(hashes.file), seal(hashes.model_dump(mode="json")))
    except (LopdError, OSError) as error:
        log.info("the hashes of %s are not remembered: %s", hashes.file.path, error)


def _memory() -> Path:
    return cache_dir() / "fingerprints"


def _key(state: FileState) -> str:
    return f"{sha256(state.path.encode())[:32]}.json"


def _state_at(file: Path) -> FileState:
    try:
        return _state(file, file.stat())
    except OSError as error:
        raise unreadable(error, file) from None


def _state(file: Path, stat: os.stat_result) -> FileState:
    return FileState(
        path=os.path.realpath(file),
        size=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        ctime_ns=stat.st_ctime_ns,
        inode=stat.st_ino,
    )


def _written(state: FileState) -> tuple[int, int]:
    """What a write changes, and a rename or a link does not."""
    return state.size, state.mtime_ns


def _changed(state: FileState) -> RetryLater:
    return RetryLater(
        "the file changed while it was read", where=state.path, fix="Wait until it is written, then run again"
    )


def unreadable(error: OSError, file: Path) -> LopdError:
    return explain(error, "read", str(file)) or StorageError(f"cannot read: {error}", where=str(file))
