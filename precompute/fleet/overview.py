"""How far a dataset is and who works on it, as anybody can tell who may read it: plan, commits, words of the boxes."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from common.canonical import as_record, canonical, parse_object
from common.config import Frozen
from common.errors import DataError
from common.pace import pace_of
from common.plans import Plan, dataset_id
from common.records import MANIFEST, read_plan, shard_of_commit
from common.status_files import STATUS, STATUS_FILE, status_key
from common.storage import Entry, NotFound, Store
from precompute.fleet.lines import ENDED
from precompute.fleet.rate import eta_s
from precompute.fleet.status import Status

SILENT_S = 180.0
"""A box writes its status twice a minute; of one that has not for so long, nobody knows whether it still is."""
LARGEST = 1 << 20
"""Bytes of a status that is read."""
READS_AT_ONCE = 16


class Box(Frozen):
    """One process at work on the dataset, now or before."""

    standing: Literal["at work", "silent", "ended"]
    heard_s: float
    """Seconds since the store took its last status."""
    status: Status


class Overview(Frozen):
    """One dataset. Sums are over all boxes that have told of themselves, the ended ones too."""

    url: str
    dataset_id: str
    kind: str
    model: str
    teacher: str | None
    complete: bool
    """Whether it has its manifest."""
    shards: int
    shards_committed: int
    last_commit_s: float | None
    """Seconds since then."""
    tokens: int
    """Of completions finished; what was finished of a shard and lost with its box counts too."""
    tokens_per_s: float
    """Of the boxes at work."""
    eta_s: float | None
    cost: float | None
    boxes_with_price: int
    rejected: int
    deaths: int
    storage_retries: int
    boxes: tuple[Box, ...]
    """Those at work first."""
    unread: tuple[str, ...]
    """Names of statuses that are none, or those of another dataset or release."""

    def standing(self, which: str) -> list[Box]:
        """The boxes that are `at work`, `silent` or `ended`."""
        return [box for box in self.boxes if box.standing == which]


def overview(url: str, now: float | None = None) -> Overview:
    """How far the dataset at `url` is.

    Args:
        now: seconds since the epoch; this machine's clock unless given. It may be asked for by those who must not
            write, so the store's clock, which is read by writing, is not asked; what the store dates later than `now`
            was written now.

    Raises:
        DataError: there is no dataset, or its plan is altered.
    """
    store = Store(url)
    try:
        plan = read_plan(store)
    except NotFound:
        raise DataError(
            "there is no dataset here", where=store.url, fix="Give the URL of one; `lopd cache ls` finds those below"
        ) from None
    commits = [entry for entry in store.list("commits") if shard_of_commit(entry.name) is not None]
    told = [entry for entry in store.list(STATUS) if STATUS_FILE.fullmatch(entry.name)]
    latest = max([time.time() if now is None else now, *(entry.modified for entry in (*commits, *told))])
    boxes, unread = _boxes(store, told, dataset_id(plan), latest)
    return _summed_up(store, plan, [entry.modified for entry in commits], boxes, unread, latest)


def _summed_up(
    store: Store, plan: Plan, commits: Sequence[float], boxes: Sequence[Box], unread: Sequence[str], now: float
) -> Overview:
    statuses = [box.status for box in boxes]
    at_work = [box.status for box in boxes if box.standing == "at work"]
    costs = [status.cost for status in statuses if status.cost is not None]
    complete = store.exists(MANIFEST)
    return Overview(
        url=store.url,
        dataset_id=dataset_id(plan),
        kind=plan["kind"],
        model=plan["policy"]["name"],
        teacher=plan["teacher"]["name"] if plan["teacher"] else None,
        complete=complete,
        shards=plan["shards"],
        shards_committed=len(commits),
        last_commit_s=now - max(commits) if commits else None,
        tokens=sum(status.tokens for status in statuses),
        tokens_per_s=sum(status.tokens_per_s for status in at_work),
        eta_s=None if complete else _time_left(plan["shards"] - len(commits), commits, at_work, now),
        cost=sum(costs) if costs else None,
        boxes_with_price=len(costs),
        rejected=sum(status.rejected for status in statuses),
        deaths=sum(status.deaths for status in statuses),
        storage_retries=sum(status.storage_retries for status in statuses),
        boxes=tuple(boxes),
        unread=tuple(unread),
    )


def _time_left(shards: int, commits: Sequence[float], at_work: Sequence[Status], now: float) -> float | None:
    """One box knows it by its rows; of several only the pace of the commits tells, or else the one that is done first.

    None while nobody is at work.
    """
    if not at_work:
        return None
    known = [status.eta_s for status in at_work if status.eta_s is not None]
    pace = pace_of(0.0, commits, now).recent
    if len(at_work) > 1 and pace:
        return eta_s(shards, pace / 60)
    return min(known, default=None)


def _boxes(store: Store, told: Sequence[Entry], dataset: str, now: float) -> tuple[list[Box], list[str]]:
    """The boxes, those at work first, then by when they were last heard of; and the names of what is no status."""
    boxes, unread = [], []
    for entry, status in _read(store, told):
        if status is None or status.dataset_id != dataset:
            unread.append(entry.name)
            continue
        heard_s = now - entry.modified
        standing = "ended" if status.state in ENDED else "silent" if heard_s > SILENT_S else "at work"
        boxes.append(Box(standing=standing, heard_s=heard_s, status=status))
    order = ("at work", "silent", "ended")
    return sorted(boxes, key=lambda box: (order.index(box.standing), box.heard_s)), unread


def _read(store: Store, told: Sequence[Entry]) -> Iterator[tuple[Entry, Status | None]]:
    """Each status; None for what is none. One that is gone since it was listed is left out."""

    def read(entry: Entry) -> bytes | None:
        try:
            return store.get(entry.name) if entry.size <= LARGEST else b""
        except NotFound:
            return None

    with ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="read") as threads:
        for entry, data in zip(told, threads.map(read, told), strict=True):
            if data is not None:
                yield entry, _parse(data, entry.name)


def _parse(data: bytes, name: str) -> Status | None:
    """Anybody who may write there may have written it, so it is believed no further than it fits."""
    try:
        status = as_record(Status, parse_object(data, name), name)
        canonical(status.model_dump(mode="json"))  # no infinite number, which JSON can spell as 1e999
        return status if status_key(status.box) == name else None
    except (DataError, ValueError):
        return None
