import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import StorageError
from common.storage import Store
from precompute.fleet import published
from precompute.fleet.published import Published
from precompute.fleet.status import Status
from tests.precompute.fleet.statuses import make_status

KEY = "status/gpu-box-4711.json"


def until(condition: Callable[[], Any]) -> None:
    """Wait for what a thread does."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def read(store: Store) -> Status:
    return Status.model_validate_json(store.get(KEY))


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every state that is stored, in its order."""
    seen: list[str] = []
    put = Store.put

    def counted(self: Store, key: str, data: bytes) -> None:
        put(self, key, data)
        seen.append(json.loads(data)["state"])

    monkeypatch.setattr(Store, "put", counted)
    return seen


def test_the_status_is_stored_and_kept_in_a_file_as_it_is(tmp_path: Path) -> None:
    store, file, told = Store(str(tmp_path / "dataset")), tmp_path / "box" / "status.json", []
    with Published(store.url, file, told.append) as place:
        place.offer(make_status())
        until(lambda: store.exists(KEY) and file.exists())
        assert read(store) == Status.model_validate_json(file.read_bytes()) == make_status()
    assert told == []


@pytest.mark.slow
def test_the_status_is_written_over_on_an_object_store(s3: str) -> None:
    with Published(s3, None, lambda line: None) as place:
        place.offer(make_status())
        until(lambda: Store(s3).exists(KEY))
        place.offer(make_status(state="complete"))
    assert read(Store(s3)).state == "complete"


def test_a_new_state_is_written_at_once_and_mere_progress_now_and_then(tmp_path: Path, writes: list[str]) -> None:
    with Published(str(tmp_path), None, lambda line: None) as place:
        place.offer(make_status(state="starting"))
        until(lambda: writes == ["starting"])
        for tokens in range(100):
            place.offer(make_status(state="starting", tokens=tokens))
        place.offer(make_status(state="running"))
        until(lambda: writes == ["starting", "running"])


def test_progress_is_written_when_its_time_has_come(
    tmp_path: Path, writes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "EVERY_S", 0.05)
    with Published(str(tmp_path), None, lambda line: None) as place:
        place.offer(make_status(tokens=1))
        until(lambda: len(writes) == 1)
        place.offer(make_status(tokens=2))
        until(lambda: len(writes) == 2)
        assert read(Store(str(tmp_path))).tokens == 2


def test_the_last_word_is_written_when_the_job_ends(tmp_path: Path) -> None:
    with Published(str(tmp_path), None, lambda line: None) as place:
        place.offer(make_status(tokens=1))
        until(lambda: Store(str(tmp_path)).exists(KEY))
        place.offer(make_status(tokens=2))
    assert read(Store(str(tmp_path))).tokens == 2


def test_a_job_that_offers_nothing_writes_nothing(tmp_path: Path) -> None:
    with Published(str(tmp_path), tmp_path / "status.json", lambda line: None):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_refuses_is_told_of_once_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def refuse(self: Store, key: str, data: bytes) -> None:
        tries.append(key)
        raise StorageError("no permission to write", where=key)

    monkeypatch.setattr(Store, "put", refuse)
    monkeypatch.setattr(published, "EVERY_S", 0.01)
    file, told = tmp_path / "status.json", []
    with Published("s3://bucket/dataset", file, told.append) as place:
        until(lambda: place.offer(make_status()) or len(tries) >= 3)
        until(file.exists)
    (line,) = told
    assert line.startswith("the status is not written to s3://bucket/dataset") and "no permission to write" in line


def test_a_file_that_cannot_be_written_is_told_of_once(tmp_path: Path) -> None:
    (tmp_path / "in-the-way").write_text("a file")
    told: list[str] = []
    with Published(None, tmp_path / "in-the-way" / "status.json", told.append) as place:
        place.offer(make_status())
        until(lambda: told)
        place.offer(make_status(state="complete"))
    assert len(told) == 1


def test_a_store_that_hangs_delays_neither_the_work_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, goes_on = threading.Event(), threading.Event()

    def hang(self: Store, key: str, data: bytes) -> None:
        hanging.set()
        goes_on.wait(60)

    monkeypatch.setattr(Store, "put", hang)
    monkeypatch.setattr(published, "LAST_WORD_S", 0.05)
    with Published(str(tmp_path), None, lambda line: None) as place:
        place.offer(make_status())
        assert hanging.wait(30)
        for tokens in range(1000):
            place.offer(make_status(tokens=tokens))
    assert not goes_on.is_set()  # the end came while the store still hung
    goes_on.set()
