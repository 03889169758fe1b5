"""`lopd precompute status`: what anybody who may read a dataset can tell of the work on it."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from common.dataset_writer import create_dataset
from common.errors import DataError
from common.plans import dataset_id
from common.records import commit_key
from common.status_files import status_key
from common.storage import Store
from precompute.fleet.overview import LARGEST, SILENT_S, overview
from precompute.fleet.published import as_bytes
from tests.cache.datasets import lopd
from tests.common.rows import make_plan, make_shard
from tests.precompute.fleet.statuses import make_replica, make_status

PLAN = make_plan(6)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A dataset of 6 shards, 3 of them committed."""
    writer = create_dataset(str(tmp_path / "dataset"), PLAN)
    for shard in range(3):
        writer.commit(shard, make_shard(shard))
    return writer.url


def say(url: str, box: str, silent_s: float = 0.0, /, **changes: Any) -> None:
    """The status of a box, stored so many seconds ago."""
    values = {"box": box, "dataset_id": dataset_id(PLAN)} | changes
    Store(url).put(status_key(box), as_bytes(make_status(**values)))
    date(Path(url) / status_key(box), silent_s)


def date(file: Path, ago_s: float) -> None:
    then = time.time() - ago_s
    os.utime(file, (then, then))


def test_before_any_box_has_told_of_itself_the_commits_tell_how_far_it_is(url: str) -> None:
    found = overview(url)
    assert (found.shards_committed, found.shards, found.complete, found.boxes) == (3, 6, False, ())
    assert (found.eta_s, found.cost, found.tokens_per_s) == (None, None, 0.0)
    assert found.dataset_id == dataset_id(PLAN)


def test_boxes_at_work_are_told_from_those_that_went_silent_or_ended(url: str) -> None:
    say(url, "c-1", SILENT_S + 60)
    say(url, "a-1", state="complete")
    say(url, "b-1", SILENT_S - 60)
    say(url, "d-1", SILENT_S + 60, state="stopped")
    assert [(box.status.box, box.standing) for box in overview(url).boxes] == [
        ("b-1", "at work"),
        ("c-1", "silent"),
        ("a-1", "ended"),
        ("d-1", "ended"),
    ]


def test_a_clock_that_is_behind_the_stores_does_not_matter(url: str) -> None:
    say(url, "a-1", SILENT_S + 60)
    say(url, "b-1")
    found = overview(url, now=0.0)
    assert {box.status.box: box.standing for box in found.boxes} == {"b-1": "at work", "a-1": "silent"}
    assert min(box.heard_s for box in found.boxes) == 0.0


def test_speed_is_of_the_boxes_at_work_and_cost_of_all(url: str) -> None:
    say(url, "a-1", tokens_per_s=100.0, cost=1.5, tokens=10)
    say(url, "b-1", tokens_per_s=10.0, cost=None, tokens=10, deaths=2)
    say(url, "c-1", SILENT_S + 1, tokens_per_s=1.0, cost=2.0, tokens=10, rejected=1)
    found = overview(url)
    assert (found.tokens_per_s, found.cost, found.boxes_with_price, found.tokens) == (110.0, 3.5, 2, 30)
    assert (found.deaths, found.rejected) == (2, 1)


def test_the_time_left_is_what_the_one_box_says(url: str) -> None:
    say(url, "a-1", eta_s=77.0)
    say(url, "b-1", SILENT_S + 1, eta_s=5.0)
    assert overview(url).eta_s == 77.0


def test_the_time_left_of_several_boxes_is_told_by_the_pace_of_their_commits(url: str) -> None:
    for shard, ago_s in enumerate((200.0, 100.0, 0.0)):
        date(Path(url) / commit_key(shard), ago_s)
    for box in ("a-1", "b-1"):
        say(url, box, eta_s=5000.0)
    assert overview(url).eta_s == pytest.approx(300.0, abs=1.0)


def test_nobody_at_work_has_no_time_left(url: str) -> None:
    say(url, "a-1", SILENT_S + 1)
    assert overview(url).eta_s is None


def test_a_finished_dataset_is_complete(url: str) -> None:
    writer = create_dataset(url, PLAN)
    for shard in writer.pending():
        writer.commit(shard, make_shard(shard))
    writer.finalize()
    found = overview(url)
    assert (found.complete, found.shards_committed, found.eta_s) == (True, 6, None)
    assert "complete, 6/6 shards (100%)" in lopd("precompute", "status", url).out


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'{"state": "running"}',
        b"\x00\xff",
        as_bytes(make_status(box="x-1", dataset_id="another")),
        as_bytes(make_status(box="y-1", dataset_id=dataset_id(PLAN))),
        as_bytes(make_status(box="x-1", dataset_id=dataset_id(PLAN))).replace(b"600.0", b"1e999"),
        as_bytes(make_status(box="x-1", dataset_id=dataset_id(PLAN))).replace(b"600.0", b"NaN"),
        b" " * (LARGEST + 1),
    ],
    ids=["empty", "cut", "list", "short", "bytes", "another dataset", "another box", "infinite", "no number", "huge"],
)
def test_what_is_no_status_of_this_dataset_is_named_and_counts_for_nothing(url: str, data: bytes) -> None:
    say(url, "a-1")
    Store(url).put("status/x-1.json", data)
    Store(url).put("status/notes.txt", b"not ours")
    found = overview(url)
    assert found.unread == ("status/x-1.json",)
    assert [box.status.box for box in found.boxes] == ["a-1"]


def test_where_there_is_no_dataset_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no dataset here"):
        overview(str(tmp_path))


@pytest.mark.slow
def test_an_object_store_tells_it_too(s3: str) -> None:
    create_dataset(s3, PLAN).commit(4, make_shard(4))
    Store(s3).put(status_key("a-1"), as_bytes(make_status(box="a-1", dataset_id=dataset_id(PLAN))))
    found = overview(s3)
    assert (found.shards_committed, found.boxes[0].standing) == (1, "at work")
    assert found.last_commit_s is not None and found.boxes[0].heard_s >= 0


def test_the_command_says_it_to_people(url: str) -> None:
    say(url, "a-1", replicas=(make_replica(), make_replica("1", state="loading")))
    say(url, "b-1", 1000.0, cost=None)
    out = lopd("precompute", "status", url).out
    assert f"{url}: 3/6 shards (50%), 3,401 tok/s, 32m00s left" in out
    assert "1 at work, 1 silent" in out and "4.20, of 1 of 2 boxes" in out
    assert "silent, perhaps gone: b-1 (16m4" in out
    row = next(line for line in out.splitlines() if line.startswith("a-1"))
    assert "running" in row and "1/2" in row


def test_the_command_says_that_nobody_is_at_work(url: str) -> None:
    assert "3/6 shards (50%), nobody at work" in lopd("precompute", "status", url).out


def test_the_command_says_it_to_programs(url: str) -> None:
    say(url, "a-1")
    told = lopd("precompute", "status", url, "--json").json
    assert told == overview(url).model_dump(mode="json") | {key: told[key] for key in ("last_commit_s", "boxes")}
    assert told["boxes"][0]["status"] == make_status(box="a-1", dataset_id=dataset_id(PLAN)).model_dump(mode="json")


def test_words_of_strangers_do_not_reach_the_terminal_as_they_are(url: str) -> None:
    say(url, "a-1", reason="\x1b[2J", url="\x1b[31m", replicas=(make_replica("\x1b]0;x\x07", devices="\x9b"),))
    for form in ("--json", "--prometheus"):
        assert all(line.isprintable() for line in lopd("precompute", "status", url, form).out.splitlines())
    assert all(line.isprintable() for line in lopd("precompute", "status", url).out.splitlines())


def test_two_forms_at_once_are_refused(url: str) -> None:
    assert lopd("precompute", "status", url, "--json", "--prometheus").code == 64
