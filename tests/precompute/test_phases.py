"""What people and files are told of a phase before it is known what is committed already."""

import io
import json
import threading
import time
from pathlib import Path

import pytest

from common.dataset_writer import DatasetWriter
from common.errors import RetryLater
from common.storage import Entry, Store
from precompute.config import Fleet
from precompute.fleet.live import View
from precompute.fleet.messages import Job
from precompute.phases import _supervise
from tests.precompute.fleet.test_supervisor import Nowhere
from tests.precompute.rows import make_writer

JOB = Job(phase="rollouts", section={}, plan={}, model="m", folder="m", max_model_len=8, window=4)


class Slow(Store):
    """A store whose listings take until they may end."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.may_end = threading.Event()

    def list(self, prefix: str = "") -> list[Entry]:
        assert self.may_end.wait(60)
        return super().list(prefix)


def test_until_a_store_tells_what_is_committed_the_status_file_says_how_it_stands_and_the_view_nothing(
    tmp_path: Path,
) -> None:
    store, file, stream = Slow(str(tmp_path / "dataset")), tmp_path / "status.json", io.StringIO()
    writer = DatasetWriter(store, make_writer(tmp_path / "dataset", "rollouts", shards=3).plan)
    found: list[tuple[str, str]] = []

    def look() -> None:
        """Once there is a status file; the store may answer then."""
        end = time.monotonic() + 30
        while not file.exists() and time.monotonic() < end:
            time.sleep(0.01)
        found.append((file.read_text() if file.exists() else "{}", stream.getvalue()))
        store.may_end.set()

    looking = threading.Thread(target=look)
    looking.start()
    fleet = Fleet(status_file=str(file), startup_s=0.1)
    with View("rollouts", stream) as view, pytest.raises(RetryLater, match="no place for an engine"):
        _supervise(JOB, fleet, writer, 3, view, Nowhere())
    looking.join()
    [(status, said)] = found
    assert json.loads(status)["state"] == "starting"
    assert said.splitlines() == ["sampling rollouts: starting"]
    assert "0/3 shards" in stream.getvalue() and json.loads(file.read_text())["state"] == "failed"
