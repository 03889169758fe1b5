"""Bytes on any fsspec URL, whole objects only.

Everything we share lies on object storage, where three habits of file code are silent data loss: streaming into a
final key (an exception inside `open(..., "wb")` publishes the truncated object), trusting a cached listing (it never
expires) and reading a range (only whole-object reads are checksummed). So a `Store` has whole-object `get`,
overwrite-safe `put`, create-only `put_new` and a fresh `list`, and nothing else.
"""

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

import fsspec
from fsspec import AbstractFileSystem

from common.errors import DataError, RetryLater, StorageError, UsageError
from common.local_files import PARTIAL, appears_whole, copy_whole, write_whole
from common.storage_errors import BAD_ENDPOINT, EXPIRED_CODES, AlreadyExists, NotFound, error_code, explain
from common.urls import clean_url

log = logging.getLogger(__name__)
Result = TypeVar("Result")
ATTEMPTS = 8
"""Tries of one operation. The pauses between them add up to half a minute at most; a store that takes requests and
never answers costs `read_timeout` each time as well."""
S3_OPTIONS = {
    "config_kwargs": {
        "retries": {"mode": "standard", "total_max_attempts": 1},  # `_retry` tries again; layers of it multiply
        "read_timeout": 60,
        "max_pool_connections": 32,
        "request_checksum_calculation": "when_supported",  # whatever the environment says: a store cannot else refuse
        # an upload in which a bit flipped, and a commit would name bytes that no object has
    },
}
S3 = {"s3", "s3a"}
ONE_REQUEST = {"max_concurrency": 1}
"""Else s3fs asks for the size first and reads a large object by ranges, which are not checksummed."""
PARALLEL_READS = 16
"""Small objects read at once."""
CREATE_ONLY = {"file", "local", "gs", "gcs"}
"""Stores whose create-only writes are known to be atomic. S3 is a protocol that many speak and not all to the end."""
PROBE = "create-only.probe"
"""Shows whether a store keeps create-only writes. It stays: who writes datasets need not be allowed to delete."""
CLOCK = ".clock"
"""Ending of the objects by which a store's clock is read; one stays where its writer may not delete."""
QUIET_LOGGERS = ("botocore", "aiobotocore", "s3fs", "fsspec")
"""At DEBUG these print the Authorization header."""


@dataclass(frozen=True)
class Entry:
    """One stored object: `name` relative to its store, `size` in bytes, `version` the store's mark of its content.

    `modified` is when it was written, in seconds since the epoch by the store's own clock; 0 where it does not say.
    """

    name: str
    size: int
    version: str = ""
    modified: float = 0.0


class Store:
    """Objects under one URL: `file://`, a plain path, `s3://`, `gs://`, anything fsspec opens.

    The filesystem is made anew in every process, because s3fs is not fork-safe; a forked child keeps the one it
    inherited, because closing that would take its sockets out of the parent's event loop. Credentials come from the
    environment alone and are never held here, nor pickled.

    Args:
        single_writer: nobody else writes here, so `put_new` may look first and write then, where the store has no
            create-only writes.
    """

    def __init__(self, url: str, *, single_writer: bool = False) -> None:
        self.url, self.single_writer = clean_url(url), single_writer
        self._filesystems: dict[int, tuple[AbstractFileSystem, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "single_writer": self.single_writer, "_filesystems": {}}

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def child(self, name: str) -> "Store":
        """The store one level down."""
        return Store(f"{self.url}/{name.strip('/')}", single_writer=self.single_writer)

    def get(self, key: str, at_most: int | None = None) -> bytes:
        """The whole object. Raises `NotFound`, `StorageError`, `RetryLater`.

        Args:
            at_most: bytes that it may have; a larger one is a `DataError` and is not downloaded.
        """
        fs, root = self._open()
        if at_most is not None:
            size = self._look_up(key, lambda fs, path: cast(int, fs.size(path)))
            if size > at_most:
                raise DataError(f"the object has {size} bytes, not {at_most}", where=f"{self.url}/{key}")
        whole = ONE_REQUEST if _protocols(fs) & S3 else {}
        return self._retry("read", key, lambda: cast(bytes, fs.cat_file(f"{root}/{key}", **whole)))

    def get_many(self, keys: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Small objects, many read at a time, in the order of `keys`. Raises as `get` does."""
        with ThreadPoolExecutor(PARALLEL_READS, thread_name_prefix="read") as threads:
            for first in range(0, len(keys), 4 * PARALLEL_READS):
                some = keys[first : first + 4 * PARALLEL_READS]
                yield from zip(some, threads.map(self.get, some), strict=True)

    def put(self, key: str, data: bytes) -> None:
        """Write `data` whole, over whatever is there. For content-addressed or derived objects."""
        fs, root = self._open()
        if _is_local(fs):
            self._retry("write", key, lambda: write_whole(Path(root) / key, BytesIO(data)))
        else:
            self._retry("write", key, lambda: fs.pipe_file(f"{root}/{key}", data))

    def put_new(self, key: str, data: bytes) -> None:
        """Write `data` only where nothing is; finding the very same bytes there is success.

        The store may have taken our object and lost its answer, in which case the retry is told that the key
        exists: only a comparison of bytes tells our own success from another's.

        Raises:
            AlreadyExists: another writer's bytes are there.
        """
        if not (self.single_writer and self.exists(key)) and self._create(key, data):
            return
        if not any(self.get(key) == data for _ in range(2)):  # twice, for a bit may flip on the way
            raise AlreadyExists("another writer was first", where=f"{self.url}/{key}")

    def require_create_only(self) -> None:
        """Refuse a store that ignores create-only writes: two workers would overwrite each other's commits.

        A store that is not known to keep them is asked to create one object twice.
        """
        fs, _ = self._open()
        if self.single_writer or _protocols(fs) & CREATE_ONLY:
            return
        if self._create(PROBE, b"Shows that this store keeps create-only writes.\n") and self._create(
            PROBE, b"It does not.\n"
        ):
            raise StorageError(
                "this store ignores create-only writes, by which workers keep out of each other's way",
                where=self.url,
                fix="Use another store, or set single_writer=true and let no second job write here",
            )

    def now(self) -> float:
        """Seconds since the epoch by the store's own clock: when an object was written that is written for this."""
        probe = f"{uuid4().hex}{CLOCK}"
        self.put(probe, b"now\n")
        try:
            return self.list(probe)[0].modified
        finally:
            self.remove(probe)

    def leftovers(self) -> list[Entry]:
        """Unfinished files that killed writers left in a local folder; object stores show none."""
        fs, root = self._open()
        found = self._retry("list", "", lambda: _find(fs, root, partial=True)) if _is_local(fs) else {}
        return _entries(found, root)

    def list(self, prefix: str = "") -> list[Entry]:
        """Every object below `prefix`, freshly listed, sorted by name; empty when there is none."""
        fs, root = self._open()
        base = f"{root}/{prefix}".rstrip("/")
        found = self._retry("list", prefix, lambda: _find(fs, base))
        return _entries(found, root)

    def exists(self, key: str) -> bool:
        """Whether the object is there now."""
        return self._look_up(key, lambda fs, path: cast(bool, fs.exists(path)))

    def fetch(self, key: str, target: Path, *, in_one_request: bool = False) -> None:
        """Copy the whole object into the local file `target`, which appears complete or not at all.

        Args:
            in_one_request: a large one comes slower, and checksummed as by `get`.
        """
        fs, root = self._open()
        how = ONE_REQUEST if in_one_request and _protocols(fs) & S3 else {}
        self._retry("fetch", key, lambda: _fetch_local(fs, f"{root}/{key}", target, how))

    def send(self, source: Path, key: str) -> None:
        """Copy the local file `source`, of any size, to the key."""
        fs, root = self._open()
        if _is_local(fs):
            self._retry("write", key, lambda: copy_whole(source, Path(root) / key))
        else:
            self._retry("write", key, lambda: fs.put_file(str(source), f"{root}/{key}"))

    def remove(self, key: str) -> None:
        """Delete the object; one that is already gone is no error. Raises `StorageError`, `RetryLater`."""
        fs, root = self._open()
        with suppress(NotFound):
            self._retry("delete", key, lambda: fs.rm_file(f"{root}/{key}"))

    def _open(self) -> tuple[AbstractFileSystem, str]:
        if os.getpid() not in self._filesystems:
            options = {"use_listings_cache": False} | (S3_OPTIONS if self.url.startswith(("s3://", "s3a://")) else {})
            for name in QUIET_LOGGERS:
                logging.getLogger(name).setLevel(max(logging.INFO, logging.getLogger(name).level))
            try:
                fs, root = fsspec.url_to_fs(self.url, skip_instance_cache=True, **options)
            except (ValueError, ImportError) as error:
                raise UsageError(f"cannot open this kind of URL: {error}", where=self.url) from None
            except OSError as error:  # of a filesystem that connects when it is made
                raise RetryLater(f"cannot connect: {error}", where=self.url, fix="Look at the host's name") from None
            fs.retries = 1  # s3fs tries again as well
            self._filesystems[os.getpid()] = (fs, root.rstrip("/"))
        return self._filesystems[os.getpid()]

    def _look_up(self, key: str, question: Callable[[AbstractFileSystem, str], Result]) -> Result:
        """The answer to a question about an object.

        S3 answers it without a body, and so without a reason when it refuses: then a byte is read, which is refused
        with the reason.
        """
        fs, root = self._open()
        path = f"{root}/{key}"

        def ask() -> Result:
            try:
                return question(fs, path)
            except OSError as error:
                if error_code(error) in ("400", "403"):
                    fs.cat_file(path, start=0, end=1)
                raise

        return self._retry("look up", key, ask)

    def _create(self, key: str, data: bytes) -> bool:
        """Whether `data` was written; False when something lies there, which may be `data`, its answer lost."""
        fs, root = self._open()
        try:
            if _is_local(fs):
                self._retry("create", key, lambda: write_whole(Path(root) / key, BytesIO(data), create=True))
            else:
                self._retry("create", key, lambda: fs.pipe_file(f"{root}/{key}", data, mode="create"))
        except FileExistsError:
            return False
        return True

    def _retry(self, verb: str, key: str, operation: Callable[[], Result]) -> Result:
        where = f"{self.url}/{key}".rstrip("/")
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return operation()
            except FileExistsError:
                raise
            except Exception as error:  # noqa: BLE001 - sorted by `explain`, which re-raises what it does not know
                failure = explain(error, verb, where)
                if failure is None:
                    raise
                if error_code(error) in EXPIRED_CODES:  # they may be renewed, and a filesystem reads them once
                    self._filesystems.pop(os.getpid(), None)
                if not isinstance(failure, RetryLater) or attempt == ATTEMPTS or error_code(error) in EXPIRED_CODES:
                    raise failure from error
                log.info("%s: %s; attempt %d of %d", where, failure.what, attempt, ATTEMPTS)
                _pause(attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")


def _protocols(fs: AbstractFileSystem) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else {*fs.protocol}


def _is_local(fs: AbstractFileSystem) -> bool:
    return "file" in _protocols(fs)


def _fetch_local(fs: AbstractFileSystem, path: str, target: Path, how: Mapping[str, Any]) -> None:
    with appears_whole(target) as partial:
        fs.get_file(path, str(partial), **how)


def _find(fs: AbstractFileSystem, base: str, partial: bool = False) -> dict[str, Any]:
    """What lies below `base`, with details: all that is whole, or all that is `partial`."""
    fs.invalidate_cache()
    try:
        found: Any = fs.find(base, detail=True)  # a dict, because of `detail`
    except FileNotFoundError as error:
        if error_code(error) == "NoSuchBucket":
            raise
        return {}
    except ValueError as error:  # nothing guards a listing: a bit that flipped in it stops botocore's parser
        if BAD_ENDPOINT in str(error):
            raise
        raise ConnectionError(f"unreadable listing: {error}") from error
    return {path: info for path, info in found.items() if path.endswith(PARTIAL) == partial}


def _entries(found: Mapping[str, Any], root: str) -> list[Entry]:
    entries = [
        Entry(path.removeprefix(f"{root}/"), int(info["size"] or 0), _version(info), _modified(info))
        for path, info in found.items()
    ]
    return sorted(entries, key=lambda entry: entry.name)


def _modified(info: Mapping[str, Any]) -> float:
    """S3 and GCS say it as a date, of two names, and a local file in seconds."""
    said = next((info[key] for key in ("LastModified", "mtime", "updated") if info.get(key)), 0.0)
    if isinstance(said, str):
        said = datetime.fromisoformat(said)
    return said.timestamp() if isinstance(said, datetime) else float(said)


def _version(info: Mapping[str, Any]) -> str:
    """What changes when the object does: its ETag, or the time it was written."""
    return str(next((info[key] for key in ("ETag", "etag", "mtime") if info.get(key)), ""))


def _pause(attempt: int) -> None:
    """Exponential back-off with full jitter: 0.5, 1, 2, 4, 8, 8, 8 s at most."""
    time.sleep(random.uniform(0, min(8.0, 0.5 * 2 ** (attempt - 1))))
