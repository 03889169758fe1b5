import logging
import os
import pickle
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError, LopdError, RetryLater, StorageError, UsageError
from common.storage import ATTEMPTS, AlreadyExists, Entry, NotFound, Store
from common.urls import clean_url
from tests.common import scripts
from tests.common.fault_proxy import fault_proxy
from tests.common.faults import Fault, Faults, Kind
from tests.s3_server import ADMIN, BUCKET, S3Server

PUT_AS_COMMAND = """
import sys
from common.errors import LopdError
from common.storage import Store
{setup}
try:
    Store(sys.argv[1]).put("data/object", b"x" * int(sys.argv[2]))
except LopdError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
WRITE_FOR_EVER = """
import sys
from common.storage import Store
store, size, turn = Store(sys.argv[1]), int(sys.argv[2]), 0
while True:
    block = bytes([turn % 256]) * size
    store.put("rewritten", block)
    store.put_new(f"new/{turn:06d}", block)
    turn += 1
"""


def names(store: Store, prefix: str = "") -> list[str]:
    return [entry.name for entry in store.list(prefix)]


def test_what_was_put_is_got_back(location: str) -> None:
    store = Store(location)
    store.put("data/one", b"first")
    store.put("data/one", b"second")

    assert store.get("data/one") == b"second"
    assert store.exists("data/one")
    assert not store.exists("data/two")


def test_a_missing_object_is_not_found_and_named(location: str) -> None:
    with pytest.raises(NotFound, match="no/such/object"):
        Store(location).get("no/such/object")


def test_a_listing_has_all_below_a_prefix_in_order_with_sizes(location: str) -> None:
    store = Store(location)
    for name in ("data/b", "data/deep/a", "data2/c", "top"):
        store.put(name, name.encode())

    assert names(store) == ["data/b", "data/deep/a", "data2/c", "top"]
    assert [(entry.name, entry.size) for entry in store.list("data")] == [("data/b", 6), ("data/deep/a", 11)]
    assert store.list("nothing") == []
    assert names(store.child("data")) == ["b", "deep/a"]


def test_a_listing_sees_what_another_writer_has_just_put(location: str) -> None:
    store = Store(location)
    store.put("commits/0", b"ours")
    assert names(store) == ["commits/0"]

    Store(location).put("commits/1", b"theirs")

    assert names(store) == ["commits/0", "commits/1"]


def test_the_version_of_an_entry_changes_with_its_content(location: str) -> None:
    store = Store(location)
    store.put("weights", b"old")
    before: Entry = store.list()[0]
    store.put("weights", b"new")

    assert store.list()[0].size == before.size
    assert store.list()[0].version != before.version


def test_a_place_where_nothing_is_lists_as_empty(location: str) -> None:
    assert Store(location).list() == []
    assert not Store(location).exists("plan.json")


def test_create_only_writes_refuse_other_bytes_and_accept_the_same(location: str) -> None:
    store = Store(location)
    store.put_new("commit", b"first")
    store.put_new("commit", b"first")

    with pytest.raises(AlreadyExists, match="commit"):
        store.put_new("commit", b"other")
    assert store.get("commit") == b"first"


def test_of_32_racing_writers_exactly_one_wins(location: str) -> None:
    stores = [Store(location) for _ in range(4)]

    def create(index: int) -> int | None:
        try:
            stores[index % 4].put_new("commit", f"writer {index}".encode())
        except AlreadyExists:
            return None
        return index

    with ThreadPoolExecutor(32) as pool:
        winners = [index for index in pool.map(create, range(32)) if index is not None]

    assert len(winners) == 1
    assert stores[0].get("commit") == f"writer {winners[0]}".encode()
    assert names(stores[0]) == ["commit"]


def test_files_travel_there_and_back(location: str, tmp_path: Path) -> None:
    source, target = tmp_path / "weights", tmp_path / "fetched" / "weights"
    source.write_bytes(os.urandom(1 << 16))
    store = Store(location)
    store.send(source, "model/weights")
    store.fetch("model/weights", target)

    assert target.read_bytes() == source.read_bytes()
    assert [file.name for file in target.parent.iterdir()] == ["weights"]
    with pytest.raises(NotFound):
        store.fetch("model/none", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_fetch_to_where_one_may_not_write_is_our_error(tmp_path: Path) -> None:
    Store(str(tmp_path)).put("object", b"x")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LopdError, match="object"):
        Store(str(tmp_path)).fetch("object", tmp_path / "file" / "object")


def test_a_store_works_in_a_forked_child(location: str) -> None:
    store = Store(location)
    store.put("object", b"parent")
    child = os.fork()
    if child == 0:  # no way out of here but os._exit: the test runner lives in the parent alone
        signal.alarm(30)
        try:
            store.put("answer", store.get("object") + b" and child")
        finally:
            os._exit(0)
    os.waitpid(child, 0)

    assert store.get("answer") == b"parent and child"


@pytest.mark.parametrize("url", ["nonsense://bucket/x", "s4://bucket"])
def test_an_unknown_kind_of_url_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError, match=url):
        Store(url).list()


def test_a_path_through_a_file_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for act in (lambda store: store.put("a", b""), lambda store: store.put_new("a", b""), lambda store: store.get("a")):
        with pytest.raises(LopdError, match="file/a"):
            act(Store(str(tmp_path / "file")))


def test_relative_and_dotted_paths_name_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    Store("here").put("a", b"1")

    for path in ("here/", "./here", "other/../here", f"file://{tmp_path}/here", (tmp_path / "here").as_uri()):
        assert names(Store(path)) == ["a"]
        assert Store(path).get("a") == b"1"


def test_a_file_url_with_a_blank_is_the_folder_that_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "größe 100%"
    Store(folder.as_uri()).put("a", b"1")
    assert (folder / "a").read_bytes() == b"1"
    assert Store(str(folder)).url == Store(folder.as_uri()).url == str(folder)
    with pytest.raises(UsageError, match=r"names no folder of this machine \(file://here/a.*file:///"):
        Store("file://here/a")


class Forgetful(MemoryFileSystem):
    """A store like many: it takes `mode="create"` and writes over what is there."""

    protocol = "forgetful"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        super().pipe_file(path, value, mode="overwrite")


def test_a_store_that_ignores_create_only_writes_is_refused() -> None:
    fsspec.register_implementation("forgetful", Forgetful, clobber=True)
    store = Store("forgetful://dataset")
    with pytest.raises(StorageError, match=r"ignores create-only writes.*\(forgetful://dataset\).*single_writer=true"):
        store.require_create_only()


def test_a_single_writer_needs_no_create_only_writes_and_still_overwrites_nothing() -> None:
    fsspec.register_implementation("forgetful", Forgetful, clobber=True)
    store = Store("forgetful://alone", single_writer=True)
    store.require_create_only()
    store.put_new("commit", b"first")
    store.put_new("commit", b"first")

    with pytest.raises(AlreadyExists, match="commit"):
        store.put_new("commit", b"other")
    assert store.get("commit") == b"first"


class ReadOnly(MemoryFileSystem):
    """A store that knows no writes, as fsspec has several."""

    protocol = "readonly"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        raise NotImplementedError


def test_a_store_that_knows_no_writes_is_a_usage_error() -> None:
    fsspec.register_implementation("readonly", ReadOnly, clobber=True)
    with pytest.raises(UsageError, match=r"one cannot create in this kind of store \(readonly://dataset"):
        Store("readonly://dataset").require_create_only()


def test_a_store_that_keeps_create_only_writes_is_accepted_again_and_again(location: str) -> None:
    for store in (Store("memory://dataset"), Store(location)):
        for _ in range(3):
            store.require_create_only()


def test_many_objects_are_read_in_the_order_asked_for(location: str) -> None:
    store = Store(location)
    keys = [f"commits/{(7 * index) % 150:03d}" for index in range(150)]
    for key in keys:
        store.put(key, key.encode())

    assert [(key, data.decode()) for key, data in store.get_many(keys)] == [(key, key) for key in keys]
    with pytest.raises(NotFound, match="commits/none"):
        list(store.get_many([*keys, "commits/none"]))


def test_an_object_larger_than_announced_is_not_downloaded(location: str) -> None:
    store = Store(location)
    store.put("shard", b"12345")

    assert store.get("shard", at_most=5) == b"12345"
    with pytest.raises(DataError, match="has 5 bytes, not 4 .*shard"):
        store.get("shard", at_most=4)


def test_the_clock_of_the_store_is_asked_and_leaves_nothing(location: str) -> None:
    store = Store(location)
    store.put("object", b"1")

    assert abs(store.now() - time.time()) < 60  # the server of these tests runs on this machine
    assert abs(store.list()[0].modified - time.time()) < 60
    assert names(store) == ["object"]


def test_what_a_killed_writer_left_in_a_folder_is_told_apart(location: str, tmp_path: Path) -> None:
    store = Store(location)
    store.put("data/object", b"1")
    local = not location.startswith("s3://")
    if local:
        (Path(location) / "data" / ".object.0a1b2c3d.part").write_bytes(b"half")

    assert [entry.name for entry in store.leftovers()] == (["data/.object.0a1b2c3d.part"] if local else [])
    assert names(store) == ["data/object"]


@pytest.mark.parametrize("refusal", [(400, "ExpiredToken"), (403, "RequestTimeTooSkewed")])
def test_expired_credentials_and_a_wrong_clock_are_for_another_time(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, refusal: tuple[int, str]
) -> None:
    status, code = refusal
    faults = Faults(Fault(Kind.REFUSE, "PUT", "/commits/", status=status, code=code))
    with fault_proxy(s3_server.endpoint, faults) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(RetryLater, match=rf"the credentials or the clock are off \({code}\).*Renew"):
            Store(s3).put_new("commits/0", b"1")


@pytest.mark.parametrize("refusal", [(400, "ExpiredToken"), (403, "RequestTimeTooSkewed")])
def test_a_refused_look_up_has_its_reason_too(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, refusal: tuple[int, str]
) -> None:
    """The answer to a HEAD has no body, and so does not say why."""
    status, code = refusal
    Store(s3).put("object", b"1")
    with fault_proxy(s3_server.endpoint, Faults(Fault(Kind.REFUSE, status=status, code=code))) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store = Store(s3)
        for look_up in (lambda: store.exists("object"), lambda: store.get("object", at_most=1)):
            with pytest.raises(RetryLater, match=rf"off \({code}\)"):
                look_up()


def test_a_writer_killed_at_any_moment_leaves_whole_objects_only(tmp_path: Path) -> None:
    size = 8 << 20
    writer = scripts.start(WRITE_FOR_EVER, str(tmp_path / "place"), str(size))
    deadline = time.monotonic() + 60
    while not list((tmp_path / "place" / "new").glob("000001")) and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(3000):  # until a write is in flight
        if list((tmp_path / "place").rglob("*.part")):
            break
    writer.kill()
    writer.communicate()

    store = Store(str(tmp_path / "place"))
    entries = store.list()
    assert len(entries) >= 2
    for entry in entries:
        data = store.get(entry.name)
        assert len(data) == size and data == data[:1] * size


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))"
    result = scripts.run(PUT_AS_COMMAND.format(setup=limit), str(tmp_path), str(1 << 20))

    assert result.returncode == 74
    assert result.stderr.count("\n") == 1 and "no space left" in result.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_read_only_folder_is_one_line() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        result = scripts.run(PUT_AS_COMMAND.format(setup=scripts.BECOME_NOBODY), folder, "10")

    assert result.returncode == 74
    assert result.stderr.count("\n") == 1 and "no permission to write" in result.stderr and folder in result.stderr
    assert "bucket" not in result.stderr and "Check who owns" in result.stderr


def test_a_missing_bucket_is_named(s3: str) -> None:
    store = Store("s3://no-such-bucket/x")
    for act in (lambda: store.get("a"), lambda: store.put("a", b"1"), lambda: store.put_new("a", b"1"), store.list):
        with pytest.raises(StorageError, match=r"bucket does not exist \(s3://no-such-bucket/x"):
            act()


def test_no_credentials_is_one_line_that_says_what_to_set(s3_server: S3Server, tmp_path: Path) -> None:
    nowhere = {"AWS_CONFIG_FILE": "/none", "AWS_SHARED_CREDENTIALS_FILE": "/none", "AWS_EC2_METADATA_DISABLED": "true"}
    env = {"AWS_ENDPOINT_URL": s3_server.endpoint, **nowhere}
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
    result = scripts.run(PUT_AS_COMMAND.format(setup=""), f"s3://{BUCKET}/x", "10", env=env, without=keys)

    assert result.returncode == 74
    assert result.stderr.count("\n") == 1 and "no S3 credentials" in result.stderr and "AWS_PROFILE" in result.stderr


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_refused_without_showing_them(
    s3: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "wrong-canary")
    with pytest.raises(StorageError, match="does not know these credentials") as raised:
        Store(s3).get("object")
    assert "canary" not in str(raised.value) + repr(raised.value)


def test_a_read_only_identity_reads_and_is_refused_to_write(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(s3).put("object", b"1")
    for name, value in s3_server.reader().items():
        monkeypatch.setenv(name, value)
    store = Store(s3)

    assert store.get("object") == b"1"
    assert names(store) == ["object"]
    for act in (lambda: store.put("new", b"2"), lambda: store.put_new("new", b"2")):
        with pytest.raises(StorageError, match=f"no permission to (write|create) .{s3}/new"):
            act()


def test_no_secret_shows_in_a_store_its_errors_or_its_logs(s3: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    store = Store(s3)
    store.put("object", b"1")
    with pytest.raises(NotFound) as raised:
        store.get("none")

    shown = repr(store) + str(store) + str(raised.value) + repr(raised.value) + caplog.text + repr(pickle.dumps(store))
    for secret in ADMIN:
        assert secret not in shown


def test_a_lost_answer_to_a_create_is_success(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults(Fault(Kind.LOSE, "PUT", "/commits/", times=1))
    with fault_proxy(s3_server.endpoint, faults) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        Store(s3).put_new("commits/000000.json", b"ours")
        assert Store(s3).get("commits/000000.json") == b"ours"

    assert faults.statuses("PUT", "/commits/") == [200, 412]  # taken; and the retry was told that it exists


def test_a_lost_answer_does_not_hide_that_another_was_first(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(s3).put_new("commits/000000.json", b"theirs")
    with fault_proxy(s3_server.endpoint, Faults(Fault(Kind.LOSE, "PUT", "/commits/", times=1))) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(AlreadyExists):
            Store(s3).put_new("commits/000000.json", b"ours")


@pytest.mark.parametrize(
    "refusal",
    [(503, "SlowDown"), (500, "InternalError"), (409, "ConditionalRequestConflict"), (409, "OperationAborted")],
)
def test_a_busy_store_is_asked_again(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, refusal: tuple[int, str]
) -> None:
    status, code = refusal
    faults = Faults(Fault(Kind.REFUSE, "PUT", "/commits/", times=1, status=status, code=code))
    with fault_proxy(s3_server.endpoint, faults) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        Store(s3).put_new("commits/0", b"1")

    assert faults.statuses("PUT", "/commits/") == [None, 200]


def test_a_lost_answer_to_a_read_is_asked_for_again(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(s3).put("data/object", b"1")
    faults = Faults(Fault(Kind.LOSE, "GET", "/data/", times=1))
    with fault_proxy(s3_server.endpoint, faults) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert Store(s3).get("data/object") == b"1"

    assert faults.statuses("GET", "/data/") == [200, 200]


def test_a_store_that_stays_away_is_for_another_time(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("common.storage.ATTEMPTS", 2)
    monkeypatch.setattr("common.storage.S3_OPTIONS", {"config_kwargs": {"retries": {"total_max_attempts": 1}}})
    with pytest.raises(RetryLater, match=f"cannot read: EndpointConnectionError .{s3}/object.*it resumes"):
        Store(s3).get("object")


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("s3://key:secret@bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket", "s3://bucket"),
        ("hf://datasets/org/name@rev/data", "hf://datasets/org/name@rev/data"),
        ("file:///a/b/", "/a/b"),
        ("file:///a%20b/gr%C3%B6%C3%9Fe", "/a b/größe"),
        ("file://localhost/a", "/a"),
    ],
)
def test_a_clean_url_names_the_place_and_nothing_secret(url: str, clean: str) -> None:
    assert clean_url(url) == clean
    assert Store(url).url == clean


SECRET = st.text("abcXYZ0189_-", min_size=8, max_size=20).map(lambda text: f"SECRET{text}")


@given(user=SECRET, password=SECRET, path=st.text("abc/", max_size=10))
def test_cleaning_strips_every_secret_and_is_done_once(user: str, password: str, path: str) -> None:
    cleaned = clean_url(f"s3://{user}:{password}@bucket/{path}")

    assert "SECRET" not in cleaned
    assert clean_url(cleaned) == cleaned


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/run#2",
        "s3://user:SECRET@bucket/run?sig=SECRET",
        "https://host/shard?X-Amz-Signature=SECRET",
        "s3://user:SECRET/SECRET@bucket/x",
        "simplecache::s3://user:SECRET@bucket/x",
        "s3://[x",
        "s3:/user:SECRET@bucket/x",
    ],
)
def test_a_url_that_does_not_name_one_place_is_refused_without_showing_it(url: str) -> None:
    """Else `run#1` and `run#2` would be one place, and a presigned URL would be written down."""
    with pytest.raises(UsageError) as raised:
        Store(url)
    assert "SECRET" not in str(raised.value)


def test_an_endpoint_or_a_bucket_of_no_possible_name_is_a_usage_error(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no bucket or key can have this name"):
        Store("s3://Bad!!bucket/x").get("object")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:8333")
    for ask in (lambda: Store(s3).list(), lambda: Store(s3).get("object")):
        with pytest.raises(UsageError, match="endpoint is no URL.*AWS_ENDPOINT_URL=http"):
            ask()


def test_a_server_that_is_not_there_when_its_filesystem_is_made_is_for_another_time() -> None:
    with pytest.raises(RetryLater, match="cannot connect"):
        Store("ftp://127.0.0.1:9/x").get("object")


def test_a_large_object_is_one_request(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a range the client checks no checksum."""
    Store(s3).put("object", bytes(60 << 20))
    faults = Faults()
    with fault_proxy(s3_server.endpoint, faults) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert len(Store(s3).get("object")) == 60 << 20
    assert [request.method for request in faults.requests] == ["GET"]


def test_a_store_that_stays_busy_is_asked_so_often_and_not_more(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that each try again would multiply."""
    monkeypatch.setattr("common.storage._pause", lambda attempt: None)
    faults = Faults(Fault(Kind.REFUSE, "GET"))
    with fault_proxy(s3_server.endpoint, faults) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(RetryLater, match="SlowDown"):
            Store(s3).get("object")
    assert faults.injected.total() == ATTEMPTS


def test_two_processes_may_ask_for_the_time_at_once(location: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        times = list(pool.map(lambda _: Store(location).now(), range(12)))
    assert max(times) - min(times) < 60
