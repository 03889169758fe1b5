from pathlib import Path

import pytest

from common.cache.find import COMMITS_READ, find
from common.records import MANIFEST, PLAN, commit_key
from common.storage import Store
from common.urls import is_url
from tests.cache.datasets import flip, lopd, make_dataset, orphan, reseal
from tests.common.fault_proxy import fault_proxy
from tests.common.faults import Fault, Faults, Kind
from tests.common.rows import IDENTITY
from tests.s3_server import S3Server


def states(url: str) -> dict[str, str]:
    return {one.path: one.state for one in find(url)}


def test_datasets_are_found_at_any_depth_among_other_files(location: str) -> None:
    make_dataset(f"{location}/run1/rollouts", kind="rollouts", shards=2, committed=[])
    make_dataset(f"{location}/run1/scored")
    make_dataset(f"{location}/a/b/c/d", shards=4, committed=[0, 2])
    Store(location).put("run1/notes.txt", b"ours is the best run")
    Store(location).put("models/config.json", b"{}")

    assert states(location) == {"a/b/c/d": "unfinished", "run1/rollouts": "unfinished", "run1/scored": "complete"}
    assert states(f"{location}/run1/scored") == {"": "complete"}


def test_a_row_says_what_the_dataset_is(location: str) -> None:
    make_dataset(location, shards=3, topk=2, overrides=["teacher-mismatch"])
    [one] = find(location)

    assert (one.kind, one.model, one.teacher) == ("scored", "org/model", "org/model")
    assert (one.rows, one.tokens, one.estimated) == (9, 36, False)  # rows of 3, 4 and 5 tokens in each shard
    assert (one.owner, one.created) == ("ann", "2026-01-02T03:04:05+00:00")
    assert one.overrides == ("teacher-mismatch",)
    assert one.bytes == sum(entry.size for entry in Store(location).list() if not entry.name.endswith(".probe"))
    assert (one.shards_committed, one.shards) == (3, 3)


def test_an_unfinished_dataset_counts_what_is_committed(location: str) -> None:
    make_dataset(location, shards=5, committed=[1, 3])
    [one] = find(location)
    assert (one.state, one.shards_committed, one.shards, one.rows, one.estimated) == ("unfinished", 2, 5, 6, False)
    assert "2/5 shards" in lopd("cache", "ls", location).out


def test_of_many_commits_a_sample_stands_for_all(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), shards=3 * COMMITS_READ, finish=False)
    [one] = find(str(tmp_path))
    assert one.estimated and one.rows == 3 * 3 * COMMITS_READ
    assert "≈" in lopd("cache", "ls", str(tmp_path)).out


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda store: flip(store, PLAN), "plan.json"),
        (lambda store: store.put(PLAN, b"{}"), "plan.json"),
        (lambda store: store.put(PLAN, b""), "plan.json: not valid JSON"),
        (lambda store: store.remove(PLAN), "no such object"),
        (lambda store: flip(store, MANIFEST), "MANIFEST.json"),
        (lambda store: reseal(store, MANIFEST, rows=10**6), "rows"),
        (lambda store: store.remove(store.list("data")[1].name), "1 of 3 shards are missing, first 1"),
        (lambda store: store.put(store.list("data")[2].name, b"short"), "another size, first 2"),
    ],
)
def test_a_broken_dataset_is_a_row_that_says_so_and_hides_no_other(tmp_path: Path, break_it, words: str) -> None:
    location = str(tmp_path)
    make_dataset(f"{location}/broken")
    make_dataset(f"{location}/whole")
    break_it(Store(f"{location}/broken"))

    broken, whole = find(location)
    assert (broken.path, broken.state) == ("broken", "damaged") and words in (broken.problem or "")
    assert (whole.path, whole.state) == ("whole", "complete")
    shown = lopd("cache", "ls", location)
    assert shown.code == 0 and f"damaged: {broken.problem}" in shown.out


def test_an_altered_commit_of_an_unfinished_dataset_is_named(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), committed=[0, 1])
    flip(Store(str(tmp_path)), commit_key(1))
    [one] = find(str(tmp_path))
    assert one.state == "damaged" and (one.problem or "").startswith("commits/000001.json: ")
    assert one.model == "org/model"  # the plan is whole, and tells


@pytest.mark.slow
def test_what_the_store_does_not_give_is_unreadable_and_not_damaged(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(s3)
    refused = Fault(Kind.REFUSE, path="plan.json", status=400, code="ExpiredToken")
    with fault_proxy(s3_server.endpoint, Faults(refused)) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        [one] = find(s3)
    assert (one.state, one.readable) == ("complete", False) and "ExpiredToken" in (one.problem or "")


def test_a_dataset_within_another_keeps_its_own_objects(tmp_path: Path) -> None:
    outer, inner = str(tmp_path / "run"), str(tmp_path / "run" / "scored")
    make_dataset(outer)
    alone = find(outer)[0].bytes
    make_dataset(inner)
    assert [(one.path, one.state, one.bytes) for one in find(outer)] == [
        ("", "complete", alone),
        ("scored", "complete", find(inner)[0].bytes),
    ]


def test_an_empty_prefix_has_no_datasets(location: str) -> None:
    if not is_url(location):
        Path(location).mkdir()
    ran = lopd("cache", "ls", location)
    assert (ran.code, ran.out) == (0, f"no dataset under {location}\n")
    assert lopd("cache", "ls", location, "--json").json == {"datasets": []}


def test_json_has_one_object_a_dataset(location: str) -> None:
    make_dataset(f"{location}/one")
    make_dataset(f"{location}/two", committed=[])
    ran = lopd("cache", "ls", location, "--json")
    assert [one["path"] for one in ran.json["datasets"]] == ["one", "two"]
    assert [one["state"] for one in ran.json["datasets"]] == ["complete", "unfinished"]
    assert [one["manifest_sha256"] is None for one in ran.json["datasets"]] == [False, True]
    assert ran.out.count("\n") == 1


def test_names_of_strangers_do_not_command_the_terminal(tmp_path: Path) -> None:
    make_dataset(
        str(tmp_path),
        policy=IDENTITY | {"name": "\x1b[2Jevil\x07"},
        created={"owner": "\x1b]0;x\x07", "at": "now", "by": "me"},
    )
    shown = lopd("cache", "ls", str(tmp_path)).out
    assert "evil" in shown and "\x1b" not in shown and "\x07" not in shown


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_an_error(s3: str) -> None:
    ran = lopd("cache", "ls", "s3://no-such-bucket-of-ours/run")
    assert ran.code == 74 and "bucket does not exist" in ran.err


@pytest.mark.slow
def test_a_reader_lists_what_others_made(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(f"{s3}/done")
    make_dataset(f"{s3}/begun", committed=[1])
    orphan(Store(f"{s3}/begun"), 0)
    for name, value in s3_server.reader().items():
        monkeypatch.setenv(name, value)
    assert states(s3) == {"begun": "unfinished", "done": "complete"}
