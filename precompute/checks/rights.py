"""Whether objects can be created, read and listed where a dataset is to be made, tried out."""

from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from common.errors import StorageError
from common.storage import PROBE, Store
from common.storage_errors import AlreadyExists
from common.urls import is_url


def try_rights(url: str, single_writer: bool) -> str:
    """Create an object at the URL, read it and list it; says so.

    In a store the object stays, and is the one by which create-only writes are tried: who writes need not be allowed to
    delete. A folder, which need not be there yet, looks as before.

    Raises:
        StorageError: one of them is refused, or the store ignores create-only writes.
        RetryLater: the store does not answer now.
    """
    store = Store(url, single_writer=single_writer)
    if is_url(store.url) and not store.url.startswith("file://"):
        store.require_create_only()
        with suppress(AlreadyExists):
            store.put_new(PROBE, b"Shows that objects can be created here.\n")
        _find_again(store, PROBE)
    else:
        _try_folder(Path(store.url.removeprefix("file://")))
    return f"{store.url} can be listed, read and written"


def _try_folder(folder: Path) -> None:
    """The nearest folder that is there already, for ours would be made in it."""
    nearest = Store(str(next(each for each in (folder, *folder.absolute().parents) if each.exists())))
    probe = f".{uuid4().hex}.probe"
    nearest.put(probe, b"")
    try:
        _find_again(nearest, probe)
    finally:
        nearest.remove(probe)


def _find_again(store: Store, key: str) -> None:
    store.get(key)
    if not store.list(key):
        raise StorageError(
            "what was written here is not listed", where=f"{store.url}/{key}", fix="Take a store with fresh lists"
        )
