"""Workers that join, stop, commit, collect and finish in any order: what a dataset promises holds after every step."""

import os
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from common import parquet
from common.cache.collect import collect
from common.canonical import sha256
from common.dataset import is_finished, open_dataset
from common.dataset_writer import DatasetWriter, create_dataset
from common.errors import DataError
from common.records import MANIFEST, Commit, commit_key, data_key
from common.schema import to_rows
from common.storage import Store
from common.storage_errors import AlreadyExists
from common.urls import is_url
from tests.common.rows import IDENTITY, make_plan, make_table, same_rows

pytestmark = pytest.mark.slow

SHARDS = 3
OLD_S = 48 * 3600
SHARD = st.integers(0, SHARDS - 1)
ATTEMPT = st.integers(0, 2)
WORKER = st.integers(0, 3)


def made_by(shard: int, attempt: int) -> pa.Table:
    """What a worker makes of a shard; sampling is not reproducible, so every attempt makes other rows."""
    return make_table(rows=2, first=100 * attempt + 10 * shard)


class Stopped(Exception):
    """A worker would have written this commit now."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data = data


class Stopping(Store):
    """A store on which a worker comes as far as its commit."""

    def put_new(self, key: str, data: bytes) -> None:
        raise Stopped(data)


class Protocol(RuleBasedStateMachine):
    """A dataset in the store beside a model of it: who won each shard, and the manifest once there is one."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url, self.store = url, Store(url)
        self.workers: list[DatasetWriter] = []
        self.commits: dict[int, bytes] = {}
        self.tables: dict[int, pa.Table] = {}
        self.underway: list[tuple[int, int, bytes]] = []
        """Shard, attempt and commit of every worker that has stored its object and not yet its commit."""
        self.manifest = b""

    @rule(name=st.sampled_from(["org/model", "/home/ann/model", "s3://models/one"]))
    def join(self, name: str) -> None:
        """One more worker, who knows the model by a name of its own."""
        plan = make_plan(SHARDS, policy={**IDENTITY, "name": name})
        self.workers.append(create_dataset(self.url, plan))
        assert self.workers[-1].plan == self.workers[0].plan

    @precondition(lambda self: self.workers)
    @rule()
    def join_with_another_plan(self) -> None:
        with pytest.raises(DataError, match="another plan lies here; it differs in vocab_size"):
            create_dataset(self.url, make_plan(SHARDS, vocab_size=101))

    @precondition(lambda self: self.workers)
    @rule(worker=WORKER, shard=SHARD, attempt=ATTEMPT)
    def commit(self, worker: int, shard: int, attempt: int) -> None:
        """The first commit of a shard holds; a loser is told what won."""
        commit = self.worker(worker).commit(shard, made_by(shard, attempt), {"attempt": attempt})
        if shard not in self.commits:
            self.commits[shard] = self.store.get(commit_key(shard))
            self.tables[shard] = made_by(shard, attempt)
        assert_names(commit, self.tables[shard])

    @precondition(lambda self: self.workers)
    @rule(worker=WORKER, attempt=ATTEMPT, dies_after=st.integers(0, SHARDS))
    def take_what_is_left(self, worker: int, attempt: int, dies_after: int) -> None:
        """A worker runs until nothing is left, or dies."""
        for done, shard in enumerate(self.worker(worker).shards_left()):
            assert shard not in self.commits
            if done == dies_after:
                return
            self.commit(worker, shard, attempt)
        assert len(self.commits) == SHARDS

    @precondition(lambda self: self.workers)
    @rule(shard=SHARD, attempt=ATTEMPT)
    def store_the_data_object(self, shard: int, attempt: int) -> None:
        """A worker stops before its commit: for a while, or for ever."""
        worker = DatasetWriter(Stopping(self.url), self.workers[0].plan)
        with pytest.raises(Stopped) as stopped:
            worker.commit(shard, made_by(shard, attempt), {"attempt": attempt})
        self.underway.append((shard, attempt, stopped.value.data))

    @precondition(lambda self: self.underway)
    @rule(index=st.integers(0, 9))
    def write_the_commit(self, index: int) -> None:
        """One of those who stopped goes on, whatever happened meanwhile."""
        shard, attempt, data = self.underway.pop(index % len(self.underway))
        if self.commits.get(shard, data) != data:
            with pytest.raises(AlreadyExists):
                self.store.put_new(commit_key(shard), data)
            return
        self.store.put_new(commit_key(shard), data)
        self.commits[shard], self.tables[shard] = data, made_by(shard, attempt)

    @precondition(lambda self: self.workers)
    @rule()
    def collect_garbage(self) -> None:
        """Of what is two days old in a folder, and new on a real store. What goes has lost to another for ever."""
        if not is_url(self.url):
            for file in Path(self.url).rglob("*.parquet"):
                os.utime(file, times=(time.time() - OLD_S, time.time() - OLD_S))
        before = self.objects()
        collect(self.url, older_than_s=0, delete=True)
        lost = {name for name in before - self.winners() if int(name[len("data/") :][:6]) in self.commits}
        assert before - self.objects() == lost

    @precondition(lambda self: self.workers)
    @rule(worker=WORKER)
    def finish(self, worker: int) -> None:
        if len(self.commits) < SHARDS:
            with pytest.raises(DataError, match=f"{SHARDS - len(self.commits)} of {SHARDS} shards are not committed"):
                self.worker(worker).finalize()
            return
        digest = self.worker(worker).finalize()
        self.manifest = self.manifest or self.store.get(MANIFEST)
        assert digest == sha256(self.manifest)

    @rule()
    def read(self) -> None:
        if not self.manifest:
            with pytest.raises(DataError, match="there is no dataset here|the dataset is not finished"):
                open_dataset(self.url)
            return
        dataset = open_dataset(self.url)
        for shard, table in self.tables.items():
            assert same_rows(to_rows(dataset.read_shard(shard)), to_rows(table))

    @invariant()
    def one_commit_a_shard_and_it_never_changes(self) -> None:
        assert {entry.name for entry in self.store.list("commits")} == {commit_key(shard) for shard in self.commits}
        assert all(self.store.get(commit_key(shard)) == data for shard, data in self.commits.items())

    @invariant()
    def every_committed_object_is_there(self) -> None:
        assert self.objects() >= self.winners()

    @invariant()
    def every_object_that_may_yet_be_committed_is_there(self) -> None:
        left = [(shard, attempt) for shard, attempt, _ in self.underway if shard not in self.commits]
        assert self.objects() >= {named(shard, made_by(shard, attempt)) for shard, attempt in left}

    @invariant()
    def all_workers_see_the_same_shards_left(self) -> None:
        for worker in self.workers[:2]:
            assert worker.pending() == [shard for shard in range(SHARDS) if shard not in self.commits]

    @invariant()
    def it_is_finished_once_its_manifest_is_there_which_never_changes(self) -> None:
        assert is_finished(self.url) == bool(self.manifest)
        assert not self.manifest or self.store.get(MANIFEST) == self.manifest

    def worker(self, index: int) -> DatasetWriter:
        return self.workers[index % len(self.workers)]

    def objects(self) -> set[str]:
        return {entry.name for entry in self.store.list("data")}

    def winners(self) -> set[str]:
        return {named(shard, table) for shard, table in self.tables.items()}


def named(shard: int, table: pa.Table) -> str:
    return data_key(shard, sha256(parquet.encode(table)))


def assert_names(commit: Commit, table: pa.Table) -> None:
    assert commit.file == named(commit.shard, table)
    assert (commit.rows, commit.bytes) == (len(table), len(parquet.encode(table)))


def machine(root: str) -> type[Protocol]:
    """The machine on a fresh place below `root` for every run."""
    runs = count()

    class Here(Protocol):
        def __init__(self) -> None:
            super().__init__(f"{root}/{next(runs)}")

    return Here


def test_any_order_of_steps_on_a_folder(tmp_path: Path) -> None:
    run_state_machine_as_test(
        machine(str(tmp_path)), settings=settings(max_examples=40, stateful_step_count=25, deadline=None)
    )


def test_what_was_stored_long_ago_may_still_be_committed(location: str) -> None:
    """One order of steps that a few runs of the machine may miss."""
    dataset = Protocol(location)
    dataset.join("org/model")
    dataset.store_the_data_object(0, 0)
    dataset.collect_garbage()
    dataset.write_the_commit(0)
    dataset.every_committed_object_is_there()


@pytest.mark.slow
def test_any_order_of_steps_on_a_store(s3: str) -> None:
    run_state_machine_as_test(machine(s3), settings=settings(max_examples=4, stateful_step_count=15, deadline=None))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Empty folders, one after another."""
    root = tmp_path_factory.mktemp("places")
    return (str(root / str(number)) for number in count())


@given(st.permutations(range(SHARDS)), st.lists(st.integers(0, 3), min_size=SHARDS, max_size=SHARDS), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_manifest_does_not_tell_who_made_which_shard_and_when(
    places: Iterator[str], order: list[int], workers: list[int], last: int
) -> None:
    def finished(url: str, order: list[int], workers: list[int], last: int) -> str:
        writers = [create_dataset(url, make_plan(SHARDS)) for _ in range(4)]
        for shard, worker in zip(order, workers, strict=True):
            writers[worker].commit(shard, made_by(shard, 0), {"tokens": 1.5})
        return writers[last].finalize()

    alone = finished(next(places), list(range(SHARDS)), [0] * SHARDS, 0)
    assert finished(next(places), order, workers, last) == alone
