"""What a verification finds: every problem is a line that says where, and none ends the search."""

import re
from dataclasses import dataclass

from common.cache.contents import shard_of
from common.errors import LopdError, RetryLater, StorageError
from common.records import COMMIT_FILE, DATA_FILE
from common.storage import Store

MAX_UNREAD = 5
"""Objects that the store may fail to give; with more of them it is out of reach, and the search ends."""
ROW = re.compile(r", row (.*)$")


@dataclass(frozen=True)
class Finding:
    """One problem; `where` is `shard 12`, the name of an object, or `dataset`."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class OutOfReach(RetryLater):
    """One object too many could not be read."""


class Findings:
    """Problems as they are found, each once, in order of shards at the end."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._found: dict[Finding, None] = {}
        self._unread: dict[Finding, None] = {}
        self.failure: StorageError | RetryLater | None = None
        """Why something could not be read; missing rights go before an outage, which passes."""

    def add(self, where: str, what: str) -> None:
        """A problem."""
        self._found[Finding(where, what)] = None

    def add_error(self, error: LopdError, where: str = "") -> None:
        """An error of ours as a problem, in the place of which it speaks unless `where` is given.

        What the store did not give is none: it says nothing about the dataset.

        Raises:
            OutOfReach: it did not give one object too many.
        """
        row = ROW.search(error.where)
        what = f"row {row.group(1)}: {error.what}" if row else error.what
        place = where or self._place(error.where)
        if not isinstance(error, (RetryLater, StorageError)):
            self.add(place, what)
            return
        self._unread[Finding(place, what)] = None
        if self.failure is None or isinstance(error, StorageError):
            self.failure = error
        if len(self._unread) > MAX_UNREAD:
            raise OutOfReach(error.what, where=error.where, fix=error.fix)

    def all(self) -> tuple[Finding, ...]:
        """Problems of records and dataset first, then by shard."""
        return tuple(sorted(self._found, key=_order))

    def unread(self) -> tuple[Finding, ...]:
        """What could not be read, and why, in the same order."""
        return tuple(sorted(self._unread, key=_order))

    def _place(self, where: str) -> str:
        """`shard 3` for its commit and its object; the name of another object; `dataset` for the rest."""
        name = where.removeprefix(f"{self._store.url}/")
        if name == where:
            return "dataset"
        commit = COMMIT_FILE.fullmatch(name)
        if commit:
            return f"shard {int(commit.group(1))}"
        return f"shard {shard_of(name)}" if DATA_FILE.fullmatch(name) else name


def _order(finding: Finding) -> tuple[bool, int, str]:
    shard = re.fullmatch(r"shard (\d+)", finding.where)
    return (shard is not None, int(shard.group(1)) if shard else 0, finding.where)
