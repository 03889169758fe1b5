"""What a verification finds: every problem is a line that says where, and none ends the search."""

import re
from dataclasses import dataclass

from common.cache.contents import shard_of
from common.errors import LopdError, RetryLater
from common.records import COMMIT_FILE, DATA_FILE
from common.storage import Store

MAX_OUTAGES = 5
"""Objects that may fail for a passing reason; with more of them the store is out of reach, and the search ends."""
ROW = re.compile(r", row (.*)$")


@dataclass(frozen=True)
class Finding:
    """One problem; `where` is `shard 12`, the name of an object, or `dataset`."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Findings:
    """Problems as they are found, each once, in order of shards at the end."""

    def __init__(self, store: Store) -> None:
        self._store, self._outages = store, 0
        self._found: dict[Finding, None] = {}

    def add(self, where: str, what: str) -> None:
        """A problem."""
        self._found[Finding(where, what)] = None

    def add_error(self, error: LopdError, where: str = "") -> None:
        """An error of ours as a problem, in the place of which it speaks unless `where` is given.

        Raises:
            RetryLater: it is one too many; what could not be read says nothing about the dataset.
        """
        if isinstance(error, RetryLater):
            self._outages += 1
            if self._outages > MAX_OUTAGES:
                raise error
        row = ROW.search(error.where)
        what = f"row {row.group(1)}: {error.what}" if row else error.what
        self.add(where or self._place(error.where), what)

    def all(self) -> tuple[Finding, ...]:
        """Problems of records and dataset first, then by shard."""
        return tuple(sorted(self._found, key=_order))

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
