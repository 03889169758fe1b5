"""Objects on their way, many at a time; a record is known by its hash before anybody relies on it."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from common.canonical import sha256
from common.errors import DataError
from common.records import READS
from common.storage import Store

Item = TypeVar("Item")
Result = TypeVar("Result")


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
