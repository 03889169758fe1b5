"""What lies where: the objects of a listing, sorted into datasets, and those of a dataset into what they are."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from common.progress import waiting
from common.records import CARD, COMMIT_FILE, DATA_FILE, MANIFEST, PLAN, Commit, shard_of_commit
from common.status_files import STATUS_FILE
from common.storage import CLOCK, PROBE, Entry, Store

log = logging.getLogger(__name__)
PARTIAL_FILE = re.compile(r"(?P<folder>.*/)?\.(?P<name>[^/]+)\.[0-9a-f]{8}\.part")
"""What a writer of local files that was killed leaves behind."""


@dataclass
class Contents:
    """The objects of one dataset; `path` is where it lies below the listed prefix, and names are relative to it."""

    path: str = ""
    records: dict[str, Entry] = field(default_factory=dict)
    """plan.json, README.md and MANIFEST.json, those that are there."""
    commits: dict[int, Entry] = field(default_factory=dict)
    """By shard."""
    data: dict[str, Entry] = field(default_factory=dict)
    """By name: `data/000012-<hash>.parquet`."""
    others: list[Entry] = field(default_factory=list)
    """Files that are none of a dataset's."""

    @property
    def bytes(self) -> int:
        """All that is stored."""
        entries = [*self.records.values(), *self.commits.values(), *self.data.values(), *self.others]
        return sum(entry.size for entry in entries)

    @property
    def finished(self) -> bool:
        """Whether there is a manifest, good or not."""
        return MANIFEST in self.records


def list_contents(store: Store) -> Contents:
    """The objects of the dataset at `store`, freshly listed; a dataset that lies deeper counts among the others."""
    return sort_contents("", _list(store))


def find_datasets(store: Store) -> list[Contents]:
    """All datasets at and below `store`, by one listing, sorted by path.

    A folder is a dataset when it holds a plan.json, or commits of shards that have lost theirs. An object belongs to
    the dataset that is deepest above it.
    """
    entries = _list(store)
    roots = {root for entry in entries if (root := _root_of(entry.name)) is not None}
    by_root: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        root = _deepest(entry.name, roots)
        if root is not None:
            name = entry.name.removeprefix(root)
            by_root[root].append(Entry(name, entry.size, entry.version, entry.modified))
    return [sort_contents(root.rstrip("/"), by_root[root]) for root in sorted(by_root)]


def sort_contents(path: str, entries: Iterable[Entry]) -> Contents:
    """Entries of one dataset, their names relative to it."""
    contents = Contents(path)
    for entry in entries:
        shard = shard_of_commit(entry.name)
        if entry.name in (PLAN, CARD, MANIFEST):
            contents.records[entry.name] = entry
        elif shard is not None:
            contents.commits[shard] = entry
        elif DATA_FILE.fullmatch(entry.name):
            contents.data[entry.name] = entry
        elif entry.name != PROBE and not entry.name.endswith(CLOCK) and not STATUS_FILE.fullmatch(entry.name):
            contents.others.append(entry)
    return contents


def shard_of(data_file: str) -> int:
    """The shard of which `data/000012-<hash>.parquet` is a writing."""
    return int(data_file.removeprefix("data/").partition("-")[0])


def orphan_count(contents: Contents) -> int:
    """Data objects that no commit can name, told from names alone: a committed shard has one object."""
    committed = {shard_of(name) for name in contents.data} & contents.commits.keys()
    return len(contents.data) - len(committed)


def missing_data(commits: Sequence[Commit], contents: Contents) -> str | None:
    """What a listing tells of commits whose objects are not there as they say; None when all are."""
    stored = {name: entry.size for name, entry in contents.data.items()}
    absent = [commit.shard for commit in commits if commit.file not in stored]
    if absent:
        return f"{len(absent)} of {len(commits)} shards are missing, first {absent[0]}"
    other = [commit.shard for commit in commits if stored[commit.file] != commit.bytes]
    if other:
        return f"{len(other)} of {len(commits)} shards have another size, first {other[0]}"
    return None


def lost_shards(contents: Contents) -> list[int]:
    """Committed shards of which no object is left, told from names alone."""
    return sorted(contents.commits.keys() - {shard_of(name) for name in contents.data})


def leftovers_of(found: Sequence[Entry]) -> list[Entry]:
    """Those of a store's leftovers that were to become a file of a dataset."""
    return [entry for entry in found if _partial_of_ours(entry.name)]


def _list(store: Store) -> list[Entry]:
    with waiting(f"listing {store.url}"):
        entries = store.list()
    log.info("%s: %d objects", store.url, len(entries))
    return entries


def _partial_of_ours(name: str) -> bool:
    match = PARTIAL_FILE.fullmatch(name)
    return match is not None and sort_contents("", [Entry(f"{match['folder'] or ''}{match['name']}", 0)]).others == []


def _root_of(name: str) -> str | None:
    """`a/b/` for `a/b/plan.json` and `a/b/commits/000001.json`; None for what tells of no dataset."""
    folder, slash, file = name.rpartition("/")
    if file == PLAN:
        return folder + slash
    match = re.fullmatch(rf"((?:.*/)?){COMMIT_FILE.pattern}", name)
    return match.group(1) if match else None


def _deepest(name: str, roots: set[str]) -> str | None:
    """The longest of `roots`, each empty or with a slash at its end, that `name` begins with."""
    folder = name
    while folder:
        folder = folder.rstrip("/").rpartition("/")[0]
        root = f"{folder}/" if folder else ""
        if root in roots:
            return root
        folder = root
    return None
