"""What stores and networks do to datasets; the table in `test_failures` says which case is where."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from common import storage
from common.canonical import seal, unseal
from common.dataset import open_dataset
from common.dataset_writer import create_dataset
from common.errors import DataError, LopdError, RetryLater, StorageError
from common.records import read_commit
from common.storage import Store
from tests.common.faults import FOR_EVER, Failing, Fault, Kind
from tests.common.jobs import make, maker, makers, names, run_job, shard_of
from tests.common.rows import make_plan

pytestmark = pytest.mark.slow


def test_every_answer_may_be_lost_once(s3: str, failing: Failing) -> None:
    keys = [
        "plan.json",
        *(f"{kind}/{shard:06d}" for kind in ("data", "commits") for shard in range(3)),
        "MANIFEST.json",
    ]
    with failing(*(Fault(Kind.LOSE, "PUT", f"/{key}", times=1) for key in keys)) as faults:
        make(s3, 1, 3)

    assert faults.injected[Kind.LOSE] == len(keys)
    assert faults.statuses("PUT", "/commits/000001") == [200, 412]  # ours was taken, and we were told that it is there
    assert makers(s3) == [1, 1, 1]


def test_a_store_that_ignores_conditions_is_refused(s3: str, failing: Failing) -> None:
    with failing(Fault(Kind.FORGET)), pytest.raises(StorageError, match=r"ignores create-only writes.*single_writer"):
        create_dataset(s3, make_plan())
    assert "plan.json" not in names(s3, "")


def test_a_single_writer_needs_no_conditions(s3: str, failing: Failing) -> None:
    with failing(Fault(Kind.FORGET)) as faults:
        for worker in (1, 2):  # the second run of the one writer finds its shards done
            writer = create_dataset(s3, make_plan(), single_writer=True)
            for shard in range(3):
                writer.commit(shard, shard_of(worker, shard))
            writer.finalize()
        with pytest.raises(DataError, match="another plan lies here"):
            create_dataset(s3, make_plan(vocab_size=101), single_writer=True)

    assert faults.injected[Kind.FORGET] > 0
    assert makers(s3) == [1, 1, 1]


@pytest.mark.parametrize(
    ("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (409, "ConditionalRequestConflict")]
)
def test_a_busy_store_is_waited_for(s3: str, failing: Failing, status: int, code: str) -> None:
    refusals = [
        Fault(Kind.REFUSE, method, path, times=3, status=status, code=code)
        for method, path in (("PUT", "/data/"), ("PUT", "/commits/"), ("GET", "/commits/"))
    ]
    with failing(*refusals) as faults:
        make(s3, 1, 1)

    assert faults.statuses("PUT", "/commits/") == [None, None, None, 200]
    assert faults.injected[refusals[0].label] == 9
    assert makers(s3) == [1]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(Kind.CUT, "GET", "/data/", times=2),
        Fault(Kind.DROP, "GET", "/data/", times=2),
        Fault(Kind.HANG, "GET", "/data/", times=1, seconds=1),
        Fault(Kind.HANG, "GET", "/data/", times=1, seconds=FOR_EVER),
        Fault(Kind.STALL, "GET", "/data/", times=1, seconds=FOR_EVER),
    ],
    ids=["cut", "dropped", "late", "answered never", "asked never"],
)
def test_a_read_that_breaks_off_or_stalls_is_done_again(
    s3: str, failing: Failing, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    make(s3, 1, 1)
    monkeypatch.setitem(storage.S3_OPTIONS["config_kwargs"], "read_timeout", 3)
    with failing(fault) as faults:
        assert makers(s3) == [1]

    assert faults.injected[fault.label] == fault.times


@pytest.mark.parametrize("key", ["/data/", "/plan.json", "/MANIFEST.json", "/commits/"])
@pytest.mark.parametrize("kind", [Kind.FLIP, Kind.SHORTEN])
@pytest.mark.parametrize("checksums", [True, False])
def test_what_was_altered_on_the_way_is_asked_for_again(
    s3: str, failing: Failing, kind: Kind, key: str, checksums: bool
) -> None:
    make(s3, 1, 1)
    with failing(Fault(kind, "GET", key, times=1, checksums=checksums)) as faults:
        assert read_commit(Store(s3), 0) == open_dataset(s3).shards[0]
        assert makers(s3) == [1]

    assert faults.injected[kind] == 1


@pytest.mark.parametrize("kind", [Kind.FLIP, Kind.SHORTEN])
def test_what_stays_altered_is_refused_by_name(s3: str, failing: Failing, own_cache: Path, kind: Kind) -> None:
    make(s3, 1, 2)
    with failing(Fault(kind, "GET", "/data/000001")):
        dataset = open_dataset(s3)
        assert maker(dataset.read_shard(0), 0) == 1
        with pytest.raises(DataError, match=r"was altered.*data/000001"):
            dataset.read_shard(1)
    for key in ("MANIFEST.json", "plan.json"):
        with failing(Fault(kind, "GET", f"/{key}")), pytest.raises(DataError, match=key):
            open_dataset(s3)

    assert len(list((own_cache / "shards").iterdir())) == 1  # nothing altered was kept
    assert makers(s3) == [1, 1]


def test_a_listing_altered_on_the_way_ends_in_no_foreign_error(s3: str, failing: Failing) -> None:
    """Nothing guards a listing, so that one may name what is not there; commits and hashes are asked after it."""
    make(s3, 1, 3)
    there, heard = names(s3, "commits"), []
    with failing(Fault(Kind.FLIP, "GET", "list-type", chance=0.7)) as faults:
        store = Store(s3)
        for _ in range(40):
            with suppress(LopdError):
                heard.append([entry.name for entry in store.list("commits")])

    assert faults.injected[Kind.FLIP] >= 20
    assert heard.count(there) >= 20


def test_an_upload_altered_on_the_way_is_sent_again(s3: str, failing: Failing) -> None:
    keys = ("/plan.json", "/data/000000", "/commits/000000", "/MANIFEST.json")
    with failing(*(Fault(Kind.ALTER, "PUT", key, times=1) for key in keys)) as faults:
        make(s3, 1, 1)

    assert faults.injected[Kind.ALTER] == len(keys)
    assert faults.statuses("PUT", "/commits/") == [400, 200]
    assert makers(s3) == [1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda store, file, other: store.remove(file),
        lambda store, file, other: store.put(file, b""),
        lambda store, file, other: store.put(file, store.get(file)[:-1]),
        lambda store, file, other: store.put(file, store.get(other)),
    ],
    ids=["deleted", "emptied", "cut short", "replaced"],
)
def test_a_shard_gone_or_replaced_is_refused_by_name(s3: str, damage: Callable[[Store, str, str], None]) -> None:
    make(s3, 1, 2)
    first, second = names(s3, "data")
    damage(Store(s3), second, first)
    dataset = open_dataset(s3)

    assert maker(dataset.read_shard(0), 0) == 1
    with pytest.raises(DataError, match=second):
        dataset.read_shard(1)


def test_a_wrong_clock_is_named(s3: str, failing: Failing) -> None:
    make(s3, 1, 1)
    with failing(Fault(Kind.REFUSE, status=403, code="RequestTimeTooSkewed")):
        result = run_job(s3)
    assert result.returncode == 75
    assert result.stderr.count("\n") == 1 and "the clock are off (RequestTimeTooSkewed)" in result.stderr
    at_reading = failing(Fault(Kind.REFUSE, path="/data/", status=403, code="RequestTimeTooSkewed"))
    with at_reading, pytest.raises(RetryLater, match=r"the clock are off \(RequestTimeTooSkewed\)"):
        open_dataset(s3).read_shard(0)


FOREIGN = st.one_of(
    st.text(max_size=40),
    st.from_regex(r"data/\d{6}-[0-9a-f]{16}\.parquet", fullmatch=True),
    st.from_regex(r"(\.\./)*data/000000-[0-9a-f]{16}\.parquet(/.*|\?.*|\n)?", fullmatch=True),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=FOREIGN)
@example("../outside.parquet")
@example("/etc/passwd")
@example("s3://other/data/000000-0123456789abcdef.parquet")
@example("data/000000-0123456789abcdef.parquet")
def test_a_manifest_names_no_file_but_its_own(s3: str, file: str) -> None:
    store = Store(s3)
    if not store.exists("MANIFEST.json"):
        make(s3, 1, 1)
    manifest = unseal(store.get("MANIFEST.json"), s3)
    assume(file != manifest["shards"][0]["file"])
    forged = {**manifest, "shards": [{**manifest["shards"][0], "file": file}]}
    store.put("forged/MANIFEST.json", seal(forged))
    store.put("forged/plan.json", store.get("plan.json"))

    with pytest.raises(DataError, match="not a path of a shard|is not the content of"):
        open_dataset(f"{s3}/forged")
