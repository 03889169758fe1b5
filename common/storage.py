"""Bytes on any fsspec URL, whole objects only.

Everything we share lies on object storage, where three habits of file code are silent data loss: streaming into a
final key (an exception inside `open(..., "wb")` publishes the truncated object), trusting a cached listing (it never
expires) and reading a range (only whole-object reads are checksummed). So a `Store` has whole-object `get`,
overwrite-safe `put`, create-only `put_new` and a fresh `list`, and nothing else.
"""

import errno
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit
from urllib.request import url2pathname
from uuid import uuid4

import fsspec
from fsspec import AbstractFileSystem

from common.errors import RetryLater, StorageError, UsageError
from common.storage_errors import EXPIRED_CODES, AlreadyExists, NotFound, error_code, explain

Result = TypeVar("Result")
ATTEMPTS = 6
"""Tries of one operation; with the pauses of `_pause` they span about half a minute."""
S3_OPTIONS = {
    "config_kwargs": {
        "retries": {"mode": "standard", "max_attempts": 5},
        "read_timeout": 60,
        "max_pool_connections": 32,
    },
}
CREATE_ONLY = {"file", "local", "s3", "s3a", "gs", "gcs"}
"""Stores whose create-only writes are known to be atomic."""
QUIET_LOGGERS = ("botocore", "aiobotocore", "s3fs", "fsspec")
"""At DEBUG these print the Authorization header."""


@dataclass(frozen=True)
class Entry:
    """One stored object: `name` relative to its store, `size` in bytes, `version` the store's mark of its content."""

    name: str
    size: int
    version: str = ""


class Store:
    """Objects under one URL: `file://`, a plain path, `s3://`, `gs://`, anything fsspec opens.

    The filesystem is made anew in every process, because s3fs is not fork-safe; a forked child keeps the one it
    inherited, because closing that would take its sockets out of the parent's event loop. Credentials come from the
    environment alone and are never held here.
    """

    def __init__(self, url: str) -> None:
        self.url = clean_url(url)
        self._filesystems: dict[int, tuple[AbstractFileSystem, str]] = {}

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def child(self, name: str) -> "Store":
        """The store one level down."""
        return Store(f"{self.url}/{name.strip('/')}")

    def get(self, key: str) -> bytes:
        """The whole object. Raises `NotFound`, `StorageError`, `RetryLater`."""
        fs, root = self._open()
        return self._retry("read", key, lambda: cast(bytes, fs.cat_file(f"{root}/{key}")))

    def put(self, key: str, data: bytes) -> None:
        """Write `data` whole, over whatever is there. For content-addressed or derived objects."""
        fs, root = self._open()
        if _is_local(fs):
            self._retry("write", key, lambda: _write_local(Path(root) / key, BytesIO(data)))
        else:
            self._retry("write", key, lambda: fs.pipe_file(f"{root}/{key}", data))

    def put_new(self, key: str, data: bytes) -> None:
        """Write `data` only where nothing is; finding the very same bytes there is success.

        The store may have taken our object and lost its answer, in which case the retry is told that the key
        exists: only a comparison of bytes tells our own success from another's.

        Raises:
            AlreadyExists: another writer's bytes are there.
        """
        fs, root = self._open()
        try:
            if _is_local(fs):
                self._retry("create", key, lambda: _write_local(Path(root) / key, BytesIO(data), create=True))
            else:
                self._retry("create", key, lambda: fs.pipe_file(f"{root}/{key}", data, mode="create"))
        except FileExistsError:
            if self.get(key) != data:
                raise AlreadyExists("another writer was first", where=f"{self.url}/{key}") from None

    def require_create_only(self) -> None:
        """Refuse a store that ignores create-only writes: two workers would overwrite each other's commits.

        Stores that are not known to keep them are asked to create one object twice.
        """
        fs, root = self._open()
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else {*fs.protocol}
        if protocols & CREATE_ONLY:
            return
        key = f".create-only-{uuid4().hex}"
        self._retry("create", key, lambda: fs.pipe_file(f"{root}/{key}", b"first", mode="create"))
        try:
            self._retry("create", key, lambda: fs.pipe_file(f"{root}/{key}", b"second", mode="create"))
        except FileExistsError:
            return
        finally:
            self.remove(key)
        raise StorageError(
            "this kind of store ignores create-only writes, on which datasets rest",
            where=self.url,
            fix="Use s3://, gs:// or a folder",
        )

    def list(self, prefix: str = "") -> list[Entry]:
        """Every object below `prefix`, freshly listed, sorted by name; empty when there is none."""
        fs, root = self._open()
        base = f"{root}/{prefix}".rstrip("/")
        found = self._retry("list", prefix, lambda: _find(fs, base))
        entries = [
            Entry(path.removeprefix(f"{root}/"), int(info["size"] or 0), _version(info)) for path, info in found.items()
        ]
        return sorted(entries, key=lambda entry: entry.name)

    def exists(self, key: str) -> bool:
        """Whether the object is there now."""
        fs, root = self._open()
        return self._retry("look up", key, lambda: fs.exists(f"{root}/{key}"))

    def fetch(self, key: str, target: Path) -> None:
        """Copy the whole object into the local file `target`, which appears complete or not at all."""
        fs, root = self._open()
        self._retry("fetch", key, lambda: _fetch_local(fs, f"{root}/{key}", target))

    def send(self, source: Path, key: str) -> None:
        """Copy the local file `source`, of any size, to the key."""
        fs, root = self._open()
        if _is_local(fs):
            self._retry("write", key, lambda: _copy_local(source, Path(root) / key))
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
            self._filesystems[os.getpid()] = (fs, root.rstrip("/"))
        return self._filesystems[os.getpid()]

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
                if not isinstance(failure, RetryLater) or attempt == ATTEMPTS or error_code(error) in EXPIRED_CODES:
                    raise failure from error
                _pause(attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")


def is_url(text: str) -> bool:
    """Whether `text` is a URL (`s3://...`) rather than a path or a Hub id."""
    return "://" in text


def clean_url(url: str) -> str:
    """`url` without user, password, query and trailing slash, and fit to be written into an artifact.

    A path is made absolute, and a `file://` URL becomes the path it names: `file:///a%20b` is `/a b`.
    """
    if not is_url(url):
        return str(Path(url).expanduser().absolute())
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise UsageError("a file URL names no folder of this machine", where=url, fix="Write file:///the/folder")
        return str(Path(url2pathname(parts.path)).absolute())
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))


def split_key(url: str) -> tuple[str, str]:
    """The store and the key of one object, given by its URL or path."""
    folder, slash, key = url.rpartition("/")
    return folder or slash or ".", key


def cache_dir() -> Path:
    """Where fetched models and shards are kept: `$LOPD_CACHE_DIR`, else `~/.cache/lightning-opd`."""
    return Path(os.environ.get("LOPD_CACHE_DIR", "~/.cache/lightning-opd")).expanduser()


def _is_local(fs: AbstractFileSystem) -> bool:
    return "file" in fs.protocol or fs.protocol == "file"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # a file is in the way, which must not be taken for an object of ours that exists
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None


@contextmanager
def _appears_whole(path: Path, create: bool = False) -> Iterator[Path]:
    """A file beside `path` to write to, linked or renamed at the end: `path` appears whole, or stays as it was."""
    _make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        yield partial
        if create:
            os.link(partial, path)
        else:
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_local(path: Path, source: BinaryIO, create: bool = False) -> None:
    with _appears_whole(path, create) as partial, open(partial, "xb") as file:
        shutil.copyfileobj(source, file, 1 << 24)
        file.flush()
        os.fsync(file.fileno())


def _copy_local(source: Path, target: Path) -> None:
    with open(source, "rb") as file:
        _write_local(target, file)


def _fetch_local(fs: AbstractFileSystem, path: str, target: Path) -> None:
    with _appears_whole(target) as partial:
        fs.get_file(path, str(partial))


def _find(fs: AbstractFileSystem, base: str) -> dict[str, Any]:
    fs.invalidate_cache()
    try:
        found: Any = fs.find(base, detail=True)  # a dict, because of `detail`
    except FileNotFoundError as error:
        if error_code(error) == "NoSuchBucket":
            raise
        return {}
    return {path: info for path, info in found.items() if not path.endswith(".part")}


def _version(info: Mapping[str, Any]) -> str:
    """What changes when the object does: its ETag, or the time it was written."""
    return str(next((info[key] for key in ("ETag", "etag", "mtime") if info.get(key)), ""))


def _pause(attempt: int) -> None:
    """Exponential back-off with full jitter: 0.5, 1, 2, 4, 8 s at most."""
    time.sleep(random.uniform(0, 0.5 * 2 ** (attempt - 1)))
