"""What is known to go wrong with shared datasets, each case on a real S3 server, and what becomes of the data.

Here is what happens to jobs; what stores and networks do to them is in `test_failing_stores`.

    1  a worker is killed before it uploads a shard   test_a_worker_killed_before_it_uploads_a_shard_costs_that_shard
    2  ... after that, before the commit              test_a_worker_killed_before_the_commit_leaves_an_orphan
       ... after the commit, before its answer        test_a_worker_killed_before_the_answer_to_its_commit_has_committed
    3  ... anywhere in finalize                       test_a_worker_killed_while_it_finishes_a_dataset
    4  the answer to a write is lost                  stores: test_every_answer_may_be_lost_once
    5  64 workers on one plan                         test_64_workers_on_one_plan_make_one_dataset
    6  two plans                                      test_two_plans_do_not_meet
    7  the store ignores If-None-Match                stores: test_a_store_that_ignores_conditions_is_refused
                                                      stores: test_a_single_writer_needs_no_conditions
    8  503 SlowDown, and its kind                     stores: test_a_busy_store_is_waited_for
    9  a connection breaks off in a read, or stalls   stores: test_a_read_that_breaks_off_or_stalls_is_done_again
   10  a bit flips, an answer is short                stores: test_what_was_altered_on_the_way_is_asked_for_again
                                                      stores: test_what_stays_altered_is_refused_by_name
                                                      stores: test_a_listing_altered_on_the_way_ends_in_no_foreign_error
                                                      stores: test_an_upload_altered_on_the_way_is_sent_again
   11  a shard is deleted or replaced after commit    stores: test_a_shard_gone_or_replaced_is_refused_by_name
   12  the disk is full                               test_a_full_disk_ends_the_job_and_more_room_resumes_it
                                                      test_a_full_cache_disk_costs_the_copy_not_the_read
   13  credentials expire in the middle               test_credentials_that_expire_end_the_job_which_resumes
   14  SIGTERM                                        test_a_job_told_to_end_leaves_what_it_committed
   15  the clock is wrong                             stores: test_a_wrong_clock_is_named
   16  a manifest that points elsewhere               stores: test_a_manifest_names_no_file_but_its_own
                                                      and thousands of others in test_fuzz_records
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.dataset import is_finished, open_dataset
from common.dataset_writer import create_dataset
from common.errors import DataError
from common.storage import Store
from tests.common import scripts
from tests.common.faults import FOR_EVER, Failing, Fault, Kind
from tests.common.jobs import JOB, make, makers, names, run_job, shard_of, start_job
from tests.common.rows import make_plan
from tests.precompute.disk import no_room_for_files_above

pytestmark = pytest.mark.slow

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


def stop_job_at(fault: Fault, url: str, failing: Failing, number: int = signal.SIGKILL) -> None:
    """Run a job until the fault holds a request of it, then send it the signal; it has ended at return."""
    with failing(fault) as faults:
        job = start_job(url)
        faults.wait_for(fault.label)
        job.send_signal(number)
        job.communicate()
    assert job.returncode == -number


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
