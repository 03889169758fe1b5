import os
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.cache.collect import HALF_WRITTEN_S, ORPHAN, Collected, Remnant, _delete, collect, exit_code, parse_age
from common.cache.contents import shard_of
from common.canonical import unseal
from common.dataset import open_dataset
from common.errors import DataError, LopdError, RetryLater, StorageError, UsageError
from common.records import MANIFEST, PLAN, commit_key, read_commits
from common.storage import Store
from tests.cache.datasets import flip, lopd, make_dataset, names, orphan
from tests.common import scripts
from tests.common.fault_proxy import fault_proxy
from tests.common.faults import Fault, Faults, Kind
from tests.common.rows import make_table
from tests.s3_server import S3Server

DAY_S = 86400.0


def age(url: str, key: str, seconds: float) -> None:
    """Say that the file was written so long ago."""
    when = time.time() - seconds
    os.utime(Path(url) / key, (when, when))


def found(url: str, older_than_s: float = 0.0, delete: bool = False) -> set[str]:
    """Names of the garbage of the one dataset at `url`."""
    [one] = collect(url, older_than_s, delete)
    assert one.refused is None
    return {garbage.name for garbage in one.garbage}


def leftover(url: str, name: str, seconds: float = 2 * DAY_S) -> str:
    """A half-written file, as a writer of local files leaves it when it is killed."""
    folder, slash, file = name.rpartition("/")
    partial = f"{folder}{slash}.{file}.0123abcd.part"
    (Path(url) / partial).write_bytes(b"half")
    age(url, partial, seconds)
    return partial


def test_without_delete_orphans_are_shown_and_stay(location: str) -> None:
    make_dataset(location)
    left = orphan(Store(location), 1)
    before = names(Store(location))

    ran = lopd("cache", "gc", location, "--older-than", "0s")

    assert ran.code == 0 and left in ran.out and "give --delete to delete them" in ran.out
    assert names(Store(location)) == before


def test_with_delete_the_orphans_go_and_the_dataset_stays_whole(location: str) -> None:
    make_dataset(location)
    left = {orphan(Store(location), 1), orphan(Store(location), 1, b"another"), orphan(Store(location), 2)}
    before = names(Store(location))

    ran = lopd("cache", "gc", location, "--older-than", "0s", "--delete")

    assert ran.code == 0 and "deleted 3 of 3 objects" in ran.out
    assert names(Store(location)) == before - left
    assert [len(open_dataset(location).read_shard(shard)) for shard in range(3)] == [3, 3, 3]
    assert "nothing to collect" in lopd("cache", "gc", location, "--older-than", "0s").out


def test_young_orphans_are_left_alone(location: str) -> None:
    make_dataset(location)
    left = orphan(Store(location), 1)
    ran = lopd("cache", "gc", location, "--delete")
    assert ran.code == 0 and "1 more are younger than 24h00m" in ran.out
    assert left in names(Store(location))


def test_what_may_yet_be_committed_is_listed_and_left_however_old_it_is(tmp_path: Path) -> None:
    url = str(tmp_path)
    make_dataset(url, committed=[0])
    in_flight = orphan(Store(url), 1)
    age(url, in_flight, 400 * DAY_S)
    [one] = collect(url, 0.0, delete=True)
    assert (one.garbage, one.young, [each.name for each in one.uncommitted_objects]) == ((), 0, [in_flight])
    assert in_flight in names(Store(url))
    shown = lopd("cache", "gc", url, "--delete").out
    assert in_flight in shown and "1 more may yet be committed" in shown


def test_a_worker_that_stores_the_same_bytes_anew_while_gc_looks_keeps_what_it_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another died before the commit long ago; this one stores and commits at the moment of a deletion."""
    url, table = str(tmp_path), make_table(rows=3, first=10)
    writer = make_dataset(url, committed=[0])
    stored = writer.commit(1, table).file
    writer.store.remove(commit_key(1))
    age(url, stored, 2 * DAY_S)
    remove = Store.remove

    def commit_first(store: Store, key: str) -> None:
        if key == stored:
            writer.commit(1, table)
        remove(store, key)

    monkeypatch.setattr(Store, "remove", commit_first)
    collect(url, DAY_S, delete=True)
    assert stored in names(Store(url))


def test_of_two_writings_of_a_committed_shard_the_one_that_lost_goes(location: str) -> None:
    writer = make_dataset(location, committed=[0])
    winner, loser = writer.commit(1, make_table(rows=3, first=10)), orphan(Store(location), 1)
    assert found(location, delete=True) == {loser}
    assert winner.file in names(Store(location))


def test_half_written_files_of_killed_writers_go_when_they_are_old(tmp_path: Path) -> None:
    url = str(tmp_path)
    make_dataset(url, committed=[0])
    old = {leftover(url, PLAN), leftover(url, commit_key(2)), leftover(url, "data/000001-0123456789abcdef.parquet")}
    young = leftover(url, MANIFEST, seconds=60)
    foreign = leftover(url, "film.mkv")
    (tmp_path / "song.mp3.part").write_bytes(b"half a song")
    age(url, "song.mp3.part", 2 * DAY_S)

    assert found(url, DAY_S, delete=True) == old
    assert {entry.name for entry in Store(url).leftovers()} == {young, foreign, "song.mp3.part"}


def test_files_of_others_are_never_touched(tmp_path: Path) -> None:
    url = str(tmp_path)
    make_dataset(f"{url}/run")
    foreign = [
        "data/000001-0123456789abcdef.parquet",  # no plan.json above it
        "run/notes.txt",
        "run/data/notes.parquet",
        "run/data/1-0123456789abcdef.parquet",
        "run/data/old/000001-0123456789abcdef.parquet",
        "run/commits/notes.json",
    ]
    for name in foreign:
        Store(url).put(name, b"mine")
        age(url, name, 100 * DAY_S)
    assert [one.garbage for one in collect(url, 0.0, delete=True)] == [()]
    assert {*foreign} <= names(Store(url))


def test_all_datasets_under_a_prefix_are_cleaned(location: str) -> None:
    make_dataset(f"{location}/a")
    make_dataset(f"{location}/b/c")
    left = [orphan(Store(f"{location}/a"), 0), orphan(Store(f"{location}/b/c"), 2)]
    value = lopd("cache", "gc", location, "--older-than", "0s", "--delete", "--json").json
    assert [(one["path"], [garbage["name"] for garbage in one["garbage"]]) for one in value["datasets"]] == [
        ("a", left[:1]),
        ("b/c", left[1:]),
    ]
    assert not names(Store(location)) & {f"a/{left[0]}", f"b/c/{left[1]}", "a/.clock", "b/c/.clock"}


@pytest.mark.parametrize("record", [PLAN, MANIFEST, commit_key(1)])
def test_where_a_record_cannot_be_read_nothing_is_deleted(record: str, location: str) -> None:
    make_dataset(f"{location}/broken")
    make_dataset(f"{location}/whole")
    left = [f"broken/{orphan(Store(f'{location}/broken'), 0)}", f"whole/{orphan(Store(f'{location}/whole'), 0)}"]
    flip(Store(f"{location}/broken"), record)

    ran = lopd("cache", "gc", location, "--older-than", "0s", "--delete")

    assert ran.code == 65 and "broken: nothing is deleted here: " in ran.out and record in ran.out
    assert names(Store(location)) & {*left} == {left[0]}


def test_committed_data_stays_when_the_manifest_is_lost(location: str) -> None:
    make_dataset(location)
    left = orphan(Store(location), 0)
    Store(location).remove(MANIFEST)
    before = names(Store(location))
    assert found(location, delete=True) == {left}
    assert names(Store(location)) == before - {left}


def test_data_that_only_the_manifest_names_stays(tmp_path: Path) -> None:
    url = str(tmp_path)
    make_dataset(url)
    Store(url).remove(commit_key(1))
    for entry in Store(url).list("data"):
        age(url, entry.name, 100 * DAY_S)
    assert found(url, delete=True) == set()
    assert len(open_dataset(url).read_shard(1)) == 3


@pytest.mark.parametrize("off_by", [-400 * DAY_S, 400 * DAY_S])
def test_the_clock_of_this_machine_does_not_matter(
    off_by: float, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(location)
    left = orphan(Store(location), 1)
    truth = time.time
    monkeypatch.setattr(time, "time", lambda: truth() + off_by)
    if location.startswith("s3://"):
        assert found_is_young(location)  # the requests are signed with the true time, by datetime
    else:
        age_by_truth = truth() - 2 * DAY_S
        assert found_is_young(location)
        os.utime(Path(location) / left, (age_by_truth, age_by_truth))
        assert found(location, DAY_S) == {left}


def found_is_young(url: str) -> bool:
    [one] = collect(url, DAY_S, delete=True)
    return one.garbage == () and one.young == 1


def test_an_orphan_that_is_committed_or_written_anew_meanwhile_stays(tmp_path: Path) -> None:
    """The second listing of the deletion sees what the first one did not."""
    url = str(tmp_path)
    make_dataset(url)
    store = Store(url)
    [commit] = read_commits(store, [1])
    anew = orphan(store, 2)
    committed = {entry.name: entry.modified for entry in store.list("data")}[commit.file]
    stale = [Remnant(commit.file, 1, DAY_S, ORPHAN, committed), Remnant(anew, 1, DAY_S, ORPHAN, 1.0)]
    assert list(_delete(store, stale)) == []
    assert {commit.file, anew} <= names(store)


def test_an_orphan_whose_shard_has_lost_its_commit_meanwhile_stays(tmp_path: Path) -> None:
    url = str(tmp_path)
    make_dataset(url, committed=[0, 1])
    store = Store(url)
    left = orphan(store, 1)
    [one] = collect(url, 0.0, delete=False)
    store.remove(commit_key(1))
    assert list(_delete(store, one.garbage)) == []
    assert left in names(store)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_state_of_a_dataset_makes_it_lose_what_is_named(data: st.DataObject) -> None:
    """Any shards committed, any orphans, any ages, records lost or altered: what a record names is still there."""
    shards = data.draw(st.integers(1, 4))
    committed = data.draw(st.sets(st.integers(0, shards - 1)))
    with tempfile.TemporaryDirectory() as url:
        make_dataset(url, shards=shards, committed=committed, finish=data.draw(st.booleans()))
        store = Store(url)
        named = {commit.file for commit in read_commits(store, sorted(committed))}
        orphans = {
            orphan(store, shard, bytes([index]))
            for index, shard in enumerate(data.draw(st.lists(st.integers(0, shards - 1), max_size=4)))
        }
        left = {leftover(url, name) for name in data.draw(st.sets(st.sampled_from([*sorted(named), PLAN])))}
        for name in data.draw(st.sets(st.sampled_from([*sorted(named | orphans), PLAN]))):
            age(url, name, data.draw(st.sampled_from([60.0, 2 * HALF_WRITTEN_S, 3 * DAY_S])))
        for name in data.draw(
            st.sets(st.sampled_from([commit_key(shard) for shard in sorted(committed)] + [MANIFEST, PLAN]))
        ):
            if name in names(store):
                data.draw(st.sampled_from([flip, lambda store, key: store.remove(key)]))(store, name)
        readable = all(
            name not in names(store) or _whole(store, name)
            for name in [*(commit_key(shard) for shard in committed), MANIFEST, PLAN]
        )
        lost = {name for name in [commit_key(shard) for shard in committed] if name not in names(store)}
        before = names(store)

        [one] = collect(url, data.draw(st.sampled_from([0.0, DAY_S])), delete=True) if _is_dataset(before) else [None]

        gone = before - names(store)
        still_named = named if MANIFEST in before else named - {_file_of(name, named) for name in lost}
        assert not gone & still_named
        assert gone <= orphans | named
        assert all(commit_key(shard_of(name)) in before for name in gone)
        if not readable or PLAN not in before:
            assert not gone and {entry.name for entry in store.leftovers()} == left
        if one is not None:
            assert one.deleted == len(gone) + len(left) - len(store.leftovers())


def _whole(store: Store, name: str) -> bool:
    try:
        unseal(store.get(name), name)
    except DataError:
        return False
    return True


def _is_dataset(found: set[str]) -> bool:
    return PLAN in found or any(name.startswith("commits/") for name in found)


def _file_of(commit: str, named: set[str]) -> str:
    shard = commit.removeprefix("commits/").removesuffix(".json")
    return next(name for name in named if name.startswith(f"data/{shard}-"))


@pytest.mark.parametrize(
    ("text", "seconds"), [("0s", 0), ("90s", 90), ("30m", 1800), ("24h", DAY_S), ("7d", 7 * DAY_S), ("2w", 14 * DAY_S)]
)
def test_ages_are_written_as_people_do(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "24", "-1h", "1.5h", "24 h", "1y", "99999999999d"])
def test_what_is_no_age_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        parse_age(text)
    assert lopd("cache", "gc", str(tmp_path), "--older-than", text).code == 64


@pytest.mark.slow
def test_who_may_not_delete_is_told_so(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(s3)
    left = orphan(Store(s3), 1)
    for name, value in s3_server.reader().items():
        monkeypatch.setenv(name, value)
    ran = lopd("cache", "gc", s3, "--older-than", "0s", "--delete")
    assert ran.code == 74 and "no permission" in ran.out and f"{s3}: nothing is deleted here" in ran.out
    assert left in names(Store(s3))


@pytest.mark.slow
def test_an_outage_of_one_dataset_says_so_and_the_others_are_cleaned(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(f"{s3}/out")
    make_dataset(f"{s3}/whole")
    kept, gone = orphan(Store(f"{s3}/out"), 0), orphan(Store(f"{s3}/whole"), 0)
    with fault_proxy(
        s3_server.endpoint, Faults(Fault(Kind.REFUSE, path="out/plan", status=400, code="ExpiredToken"))
    ) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        ran = lopd("cache", "gc", s3, "--older-than", "0s", "--delete")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    assert ran.code == 75 and "out: nothing is deleted here" in ran.out
    assert names(Store(s3)) & {f"out/{kept}", f"whole/{gone}"} == {f"out/{kept}"}


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ([], 0),
        ([RetryLater], 75),
        ([RetryLater, DataError], 65),
        ([DataError, StorageError, RetryLater], 74),
    ],
)
def test_the_exit_code_is_that_of_the_worst_refusal(errors: list[type[LopdError]], code: int) -> None:
    refused = [Collected("", "", refused="so", exit_code=error.exit_code) for error in errors]
    assert exit_code([Collected("", ""), *refused]) == code


def test_a_worker_killed_while_it_writes_leaves_what_gc_finds(tmp_path: Path) -> None:
    url = str(tmp_path)
    make_dataset(url, committed=[0])
    script = """
import os, sys
from common.storage import Store
class Dies:
    def read(self, count): os.kill(os.getpid(), 9)
from common.local_files import write_whole
from pathlib import Path
write_whole(Path(sys.argv[1]) / "data/000002-0123456789abcdef.parquet", Dies())
"""
    assert scripts.run(script, url).returncode == -9
    [partial] = [entry.name for entry in Store(url).leftovers()]
    assert found(url) == set()
    age(url, partial, 2 * HALF_WRITTEN_S)
    assert found(url, delete=True) == {partial}
    assert Store(url).leftovers() == []
