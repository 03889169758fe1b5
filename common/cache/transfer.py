"""Shards and records on their way: many at a time, each known by its hash before anybody relies on it."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from common.canonical import sha256
from common.errors import DataError
from common.records import READS, REBUILD, Commit
from common.storage import NotFound, Store

Item = TypeVar("Item")
Result = TypeVar("Result")


def shard_bytes(store: Store, commit: Commit) -> bytes:
    """The object of a commit, downloaded whatever a cache holds, and read again before it is called altered.

    Raises:
        DataError: it is missing, of another size, or altered.
    """
    where = f"{store.url}/{commit.file}"
    for _ in range(READS):
        try:
            data = store.get(commit.file, at_most=commit.bytes)
        except NotFound:
            raise DataError("the shard is missing", where=where, fix=REBUILD) from None
        if sha256(data) == commit.sha256:
            return data
    raise DataError("the shard was altered: its sha256 differs", where=where, fix=REBUILD)


def record_bytes(store: Store, key: str, digest: str) -> bytes:
    """The record of that sha256, just as it is stored. Raises `DataError` when it is no more what it was."""
    for _ in range(READS):
        data = store.get(key)
        if sha256(data) == digest:
            return data
    raise DataError("the record was altered meanwhile", where=f"{store.url}/{key}", fix="Run the same command again")


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """The results of `work` on `items`, as they come. An error ends it, once what has begun is done."""
    waiting: set[Future[Result]] = set()
    with ThreadPoolExecutor(threads, thread_name_prefix=work.__name__) as pool:
        try:
            for item in items:
                waiting.add(pool.submit(work, item))
                if len(waiting) >= 2 * threads:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            for future in waiting:
                future.cancel()
