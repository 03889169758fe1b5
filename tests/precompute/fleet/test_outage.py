"""A store that goes away in the middle of a phase: the box waits for it, or ends as one that is to be resumed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from common.dataset import open_dataset
from common.records import committed_shards
from common.storage import Store
from tests.precompute.commands import ROOT
from tests.precompute.fleet import stage
from tests.precompute.fleet.puppet import SCRIPT
from tests.s3_server import BUCKET, S3Server, free_ports, run_server

URL = f"s3://{BUCKET}/outage"


@contextmanager
def sampling(folder: Path, said: Path, *settings: str) -> Iterator["subprocess.Popen[bytes]"]:
    """The command that samples onto the server; it is killed at the end."""
    settings = (*stage.settings(folder), *settings)
    words = [word for setting in settings if "cache=" not in setting for word in ("--set", setting)]
    command = [sys.executable, "-m", "tests.precompute.fleet.command", "precompute", "rollouts", "--cache", URL, *words]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", SCRIPT: str(folder / "script.json")}
    with said.open("w") as stderr:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def await_commits(process: "subprocess.Popen[bytes]", said: Path, more_than: int) -> int:
    """How many there are once there are more than so many."""
    store = Store(URL)
    while (count := len(committed_shards(store))) <= more_than:
        assert process.poll() is None, said.read_text()
        time.sleep(0.1)
    return count


@pytest.mark.slow
def test_a_job_ends_as_resumable_when_the_store_stays_away_and_the_next_waits_for_it_with_all_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.prepare(tmp_path)
    (tmp_path / "server").mkdir()
    (tmp_path / "script.json").write_text(json.dumps({"step_s": 0.1}))
    ports, impatient, patient = free_ports(), tmp_path / "impatient.txt", tmp_path / "patient.txt"
    for name, value in S3Server(f"http://127.0.0.1:{ports[0]}").environment().items():
        monkeypatch.setenv(name, value)

    with ExitStack() as left:
        with run_server(tmp_path / "server", ports):
            first = left.enter_context(sampling(tmp_path, impatient, "fleet.storage_patience_s=0"))
            made = await_commits(first, impatient, 0)
        assert first.wait(timeout=200) == 75
        said = impatient.read_text()
        assert said.count("error: ") == 1 and "the same command again: it resumes" in said.splitlines()[-1]
        assert "Traceback" not in said

        with run_server(tmp_path / "server", ports):
            second = left.enter_context(sampling(tmp_path, patient, "fleet.hang_s=4"))
            await_commits(second, patient, made)
        while "trying again for" not in patient.read_text():
            assert second.poll() is None, patient.read_text()
            time.sleep(0.1)
        with run_server(tmp_path / "server", ports):
            assert second.wait(timeout=200) == 0, patient.read_text()
            said = patient.read_text()
            assert "the store is back after" in said and "died" not in said and "Traceback" not in said
            assert stage.faults_of(open_dataset(URL)) == []
