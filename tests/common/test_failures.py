"""Everything that is known to go wrong with shared datasets, on a real S3 server, and what becomes of the data.

 1  a worker is killed before it uploads a shard   test_a_worker_killed_before_it_uploads_a_shard_costs_that_shard
 2  ... after that, before the commit              test_a_worker_killed_before_the_commit_leaves_an_orphan
    ... after the commit, before its answer        test_a_worker_killed_before_the_answer_to_its_commit_has_committed
 3  ... anywhere in finalize                       test_a_worker_killed_while_it_finishes_a_dataset
 4  the answer to a write is lost                  test_every_answer_may_be_lost_once
 5  64 workers on one plan                         test_64_workers_on_one_plan_make_one_dataset
 6  two plans                                      test_two_plans_do_not_meet
 7  the store ignores If-None-Match                test_a_store_that_ignores_conditions_is_refused
                                                   test_a_single_writer_needs_no_conditions
 8  503 SlowDown, and its kind                     test_a_busy_store_is_waited_for
 9  a connection breaks off in a read, or stalls   test_a_read_that_breaks_off_or_stalls_is_done_again
10  a bit flips, an answer is short                test_what_was_altered_on_the_way_is_asked_for_again
                                                   test_what_stays_altered_is_refused_by_name
                                                   test_an_upload_altered_on_the_way_is_sent_again
11  a shard is deleted or replaced after commit    test_a_shard_gone_or_replaced_is_refused_by_name
12  the disk is full                               test_a_full_disk_ends_the_job_and_more_room_resumes_it
                                                   test_a_full_cache_disk_costs_the_copy_not_the_read
13  credentials expire in the middle               test_credentials_that_expire_end_the_job_which_resumes
14  SIGTERM                                        test_a_job_told_to_end_leaves_what_it_committed
15  the clock is wrong                             test_a_wrong_clock_is_named
16  a manifest that points elsewhere               test_a_manifest_names_no_file_but_its_own
                                                      and thousands of others in test_fuzz_records.py
"""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from common.canonical import seal, unseal
from common.dataset import is_finished, open_dataset
from common.dataset_writer import create_dataset
from common.errors import DataError, RetryLater, StorageError
from common.records import read_commit
from common.storage import Store
from tests.common import scripts
from tests.common.fault_proxy import fault_proxy
from tests.common.faults import Fault, Faults, Kind
from tests.common.jobs import JOB, make, maker, run_job, shard_of, start_job
from tests.common.rows import make_plan
from tests.precompute.disk import no_room_for_files_above
from tests.s3_server import S3Server

pytestmark = pytest.mark.slow

Failing = Callable[..., AbstractContextManager[Faults]]
FOR_EVER = 300.0
"""Seconds of a stall that the end of the proxy cuts short."""
RACE = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from common.dataset_writer import create_dataset
from tests.common.jobs import shard_of
from tests.common.rows import make_plan

def work(worker):
    writer = create_dataset(sys.argv[1], make_plan(3))
    commits = [writer.commit(shard, shard_of(worker, shard)).sha256 for shard in range(3)]
    return [*commits, writer.finalize()]

with ThreadPoolExecutor(16) as threads:
    print(json.dumps(list(threads.map(work, range(int(sys.argv[2]), int(sys.argv[2]) + 16)))))
"""
FULL_DISK = """
mount -t tmpfs -o size=64k none "$PLACE" || exit 99
"$PYTHON" -c "$JOB" "$PLACE" 1 20; echo "exit $?"
find "$PLACE" -type f -printf "%P\\n"
mount -o remount,size=8m "$PLACE"
"$PYTHON" -c "$JOB" "$PLACE" 2 20; echo "exit $?"
find "$PLACE" -name MANIFEST.json -printf "%P\\n"
"""


@pytest.fixture
def failing(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Failing:
    """`with failing(fault, ...) as faults`: the store is reached through the fault proxy, and directly afterwards."""

    @contextmanager
    def through(*faults: Fault) -> Iterator[Faults]:
        injected = Faults(*faults)
        with fault_proxy(s3_server.endpoint, injected) as endpoint, monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            yield injected

    return through


def stop_job_at(fault: Fault, url: str, failing: Failing, number: int = signal.SIGKILL) -> subprocess.Popen[str]:
    """Run a job until the fault holds a request of it, then send it the signal; it has ended at return."""
    with failing(fault) as faults:
        job = start_job(url)
        faults.wait_for(fault.label)
        job.send_signal(number)
        job.communicate()
    assert job.returncode == -number
    return job


def makers(url: str, workers: range = range(1, 3)) -> list[int]:
    """Who made each shard of the finished dataset."""
    dataset = open_dataset(url)
    return [maker(dataset.read_shard(shard), shard, workers) for shard in range(dataset.num_shards)]


def names(url: str, prefix: str) -> list[str]:
    return [entry.name for entry in Store(url).list(prefix)]


def test_a_worker_killed_before_it_uploads_a_shard_costs_that_shard(s3: str, failing: Failing) -> None:
    stop_job_at(Fault(Kind.STALL, "PUT", "/data/000001", seconds=FOR_EVER), s3, failing)

    assert len(names(s3, "data")) == 1
    assert create_dataset(s3, make_plan()).pending() == [1, 2]
    make(s3, 2, 3)
    assert makers(s3) == [1, 2, 2]


def test_a_worker_killed_before_the_commit_leaves_an_orphan(s3: str, failing: Failing) -> None:
    stop_job_at(Fault(Kind.STALL, "PUT", "/commits/000001", seconds=FOR_EVER), s3, failing)

    assert create_dataset(s3, make_plan()).pending() == [1, 2]
    make(s3, 2, 3)
    assert makers(s3) == [1, 2, 2]
    assert len(names(s3, "data")) == 4


def test_a_worker_killed_before_the_answer_to_its_commit_has_committed(s3: str, failing: Failing) -> None:
    stop_job_at(Fault(Kind.HANG, "PUT", "/commits/000001", seconds=FOR_EVER), s3, failing)

    assert create_dataset(s3, make_plan()).pending() == [2]
    make(s3, 2, 3)
    assert makers(s3) == [1, 1, 2]


@pytest.mark.parametrize(
    ("step", "finished"),
    [
        (Fault(Kind.STALL, "GET", "/commits/000001", seconds=FOR_EVER), False),
        (Fault(Kind.STALL, "PUT", "/README.md", seconds=FOR_EVER), False),
        (Fault(Kind.STALL, "PUT", "/MANIFEST.json", seconds=FOR_EVER), False),
        (Fault(Kind.HANG, "PUT", "/MANIFEST.json", seconds=FOR_EVER), True),
    ],
    ids=["reading commits", "writing the card", "writing the manifest", "after the manifest"],
)
def test_a_worker_killed_while_it_finishes_a_dataset(s3: str, failing: Failing, step: Fault, finished: bool) -> None:
    stop_job_at(step, s3, failing)

    assert is_finished(s3) == finished
    before = Store(s3).list("data")
    pin = create_dataset(s3, make_plan()).finalize()
    assert open_dataset(s3).manifest_sha256 == pin
    assert makers(s3) == [1, 1, 1]
    assert Store(s3).list("data") == before  # finishing costs no work again


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


def test_64_workers_on_one_plan_make_one_dataset(s3: str) -> None:
    processes = [scripts.start(RACE, s3, str(first)) for first in range(0, 64, 16)]
    answers = [answer for process in processes for answer in json.loads(process.communicate()[0])]

    assert len(answers) == 64
    assert all(answer == answers[0] for answer in answers)  # each was told the same winners and the same manifest
    dataset = open_dataset(s3)
    assert [*(commit.sha256 for commit in dataset.shards), dataset.manifest_sha256] == answers[0]
    assert len(makers(s3, range(64))) == 3
    assert len(names(s3, "commits")) == 3


def test_two_plans_do_not_meet(s3: str) -> None:
    ours, theirs = make_plan(1), make_plan(1, vocab_size=101)
    for name, plan in {"ours": ours, "theirs": theirs}.items():
        writer = create_dataset(f"{s3}/{name}", plan)
        writer.commit(0, shard_of(1, 0))
        writer.finalize()

    ids = [open_dataset(f"{s3}/{name}").manifest["dataset_id"] for name in ("ours", "theirs")]
    assert ids[0] != ids[1]
    with pytest.raises(DataError, match=r"differs in vocab_size"):
        create_dataset(f"{s3}/ours", theirs)
    assert makers(f"{s3}/ours") == [1]


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
    monkeypatch.setitem(sys.modules["common.storage"].S3_OPTIONS["config_kwargs"], "read_timeout", 3)
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


def test_a_full_disk_ends_the_job_and_more_room_resumes_it(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "--map-root-user", "--mount", "true"], check=False).returncode:
        pytest.skip("no file system may be mounted here")
    result = subprocess.run(
        [unshare, "--map-root-user", "--mount", "sh", "-c", FULL_DISK],
        env={"PLACE": str(tmp_path), "PYTHON": sys.executable, "JOB": JOB},
        cwd=scripts.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    first, *there, second, manifest = result.stdout.splitlines()

    assert (first, second, manifest) == ("exit 74", "exit 0", "MANIFEST.json")
    assert result.stderr.count("\n") == 1 and "no space left" in result.stderr and "it resumes" in result.stderr
    assert 0 < sum(name.startswith("commits/") for name in there) < 20
    assert "MANIFEST.json" not in there and not any(name.endswith(".part") for name in there)


def test_a_full_cache_disk_costs_the_copy_not_the_read(s3: str, own_cache: Path) -> None:
    make(s3, 1, 2)
    with no_room_for_files_above(1000):
        assert makers(s3) == [1, 1]
    assert [file for file in own_cache.rglob("*") if file.is_file()] == []


def test_credentials_that_expire_end_the_job_which_resumes(s3: str, failing: Failing) -> None:
    with failing(Fault(Kind.REFUSE, path="/data/000002", status=400, code="ExpiredToken")):
        result = run_job(s3)

    assert result.returncode == 75
    assert result.stderr.count("\n") == 1 and "(ExpiredToken)" in result.stderr and "Renew" in result.stderr
    assert create_dataset(s3, make_plan()).pending() == [2]
    assert run_job(s3, worker=2).returncode == 0
    assert makers(s3) == [1, 1, 2]


def test_a_job_told_to_end_leaves_what_it_committed(s3: str, failing: Failing) -> None:
    """A shell shows the end by SIGTERM as 143."""
    stop_job_at(Fault(Kind.STALL, "PUT", "/data/000001", seconds=FOR_EVER), s3, failing, signal.SIGTERM)

    assert create_dataset(s3, make_plan()).pending() == [1, 2]
    assert run_job(s3, worker=2).returncode == 0
    assert makers(s3) == [1, 2, 2]


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
