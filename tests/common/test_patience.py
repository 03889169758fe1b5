"""A store that is away for minutes is waited for; one that stays away is told of; a refusal is waited for by nobody."""

import threading
import time
from pathlib import Path

import pytest

from common import patience, storage
from common.errors import RetryLater, StorageError
from common.patience import patiently
from common.storage import Store
from tests.common.faults import Failing, Fault, Kind
from tests.s3_server import ADMIN, BUCKET, READER, free_ports, run_server


class Away:
    """A store that fails so many times and then answers."""

    def __init__(self, times: int) -> None:
        self.left, self.asked = times, 0

    def __call__(self) -> str:
        self.asked += 1
        if self.left:
            self.left -= 1
            raise RetryLater("cannot write: SlowDown", where="s3://b/x", fix="Run the same command again")
        return "stored"


def test_a_store_that_answers_is_asked_once_and_nothing_is_said() -> None:
    store, said = Away(0), list[str]()
    assert patiently(store, 60, said.append) == "stored"
    assert (store.asked, said) == (1, [])


def test_people_are_told_that_it_waits_that_it_still_waits_and_that_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 1e-3)
    monkeypatch.setattr(patience, "TOLD_EVERY_S", 0)
    said = list[str]()
    assert patiently(Away(3), 600, said.append) == "stored"
    assert said == [
        "s3://b/x: cannot write: SlowDown; trying again for 10m00s",
        "s3://b/x: cannot write: SlowDown since 0s; giving up in 10m00s",
        "s3://b/x: cannot write: SlowDown since 0s; giving up in 10m00s",
        "the store is back after 0s",
    ]


def test_a_store_that_stays_away_is_asked_until_the_end_and_its_failure_goes_on() -> None:
    store, said, started = Away(10**9), list[str](), time.monotonic()
    with pytest.raises(RetryLater, match="SlowDown") as caught:
        patiently(store, 0.7, said.append)
    assert caught.value.exit_code == 75
    assert store.asked >= 3
    assert time.monotonic() - started >= 0.7
    assert len(said) == 1


def test_without_patience_the_first_failure_goes_on() -> None:
    store, said = Away(1), list[str]()
    with pytest.raises(RetryLater):
        patiently(store, 0, said.append)
    assert (store.asked, said) == (1, [])


def test_a_wait_can_be_called_off() -> None:
    store, ending, raised = Away(10**9), threading.Event(), list[RetryLater]()

    def wait() -> None:
        try:
            patiently(store, 3600, lambda text: None, ending.is_set)
        except RetryLater as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while store.asked < 2:
        time.sleep(0.01)
    ending.set()
    thread.join(60)
    assert not thread.is_alive()
    assert len(raised) == 1


def test_what_a_person_must_mend_is_not_waited_for() -> None:
    def refused() -> None:
        raise StorageError("no permission to write", where="s3://b/x")

    said = list[str]()
    with pytest.raises(StorageError):
        patiently(refused, 60, said.append)
    assert said == []


@pytest.mark.slow
def test_a_write_outlasts_a_server_that_is_killed_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.5)
    ports, said, done = free_ports(), list[str](), list[bytes]()
    with run_server(tmp_path, ports) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        store = Store(f"s3://{BUCKET}/place")
        store.put("before", b"1")

    def write() -> None:
        patiently(lambda: store.put_new("during", b"2"), 300, said.append)
        done.append(store.get("before"))

    thread = threading.Thread(target=write)
    thread.start()
    while not said:
        time.sleep(0.05)
    assert "s3://tests/place/during: cannot create" in said[0]
    assert said[0].endswith("trying again for 5m00s")
    with run_server(tmp_path, ports):
        thread.join(120)
        assert Store(store.url).get("during") == b"2"
    assert done == [b"1"]
    assert said[-1].startswith("the store is back after")


def test_credentials_that_are_renewed_during_the_wait_are_read_anew(
    s3: str, failing: Failing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grant(identity: tuple[str, str]) -> None:
        key, secret = identity
        file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")

    file = tmp_path / "credentials"
    grant(READER)  # who may not write
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    with failing(Fault(Kind.REFUSE, "PUT", times=1, status=400, code="ExpiredToken")):
        store = Store(s3)
        patiently(lambda: store.put("object", b"1"), 60, lambda text: grant(ADMIN))
        assert store.get("object") == b"1"
