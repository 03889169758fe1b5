"""A phase whose engines die, hang or run out of memory: the dataset must come out whole. At random: `tests.chaos`."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.config import load_section
from common.dataset import open_dataset
from common.errors import RetryLater
from common.prompts import load_prompts
from precompute.config import Generate
from precompute.fleet.replica import Replica, Slot
from precompute.fleet.suspects import GUILTY
from precompute.phases import make_rollouts
from tests.precompute.commands import ROOT
from tests.precompute.fleet import stage
from tests.precompute.fleet.puppet import SCRIPT

pytestmark = pytest.mark.slow

POISON = ("p007/1",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stage.prepare(tmp_path)
    return tmp_path


@contextmanager
def running(folder: Path, *settings: str, **script: Any) -> Iterator["subprocess.Popen[str]"]:
    """A supervisor and its workers; all that is left of them is killed at the end."""
    (folder / "script.json").write_text(json.dumps(script))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.precompute.fleet.stage", str(folder), *settings],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", SCRIPT: str(folder / "script.json")},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        for worker in workers(process):
            worker.kill()
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def finish(folder: Path, *settings: str, **script: Any) -> tuple[int, str]:
    """Exit code and stderr of a run that nobody disturbs."""
    with running(folder, *settings, **script) as process:
        _, said = process.communicate(timeout=120)
        return process.returncode, said


def workers(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    try:
        return [child for child in psutil.Process(process.pid).children() if "puppet" in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def committed(folder: Path) -> int:
    return len(list((folder / "dataset" / "commits").glob("*.json")))


def await_commits(folder: Path, process: "subprocess.Popen[str]", count: int) -> None:
    while committed(folder) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_several_replicas_share_the_shards_and_each_is_made_once(folder: Path) -> None:
    code, said = finish(folder, "fleet.replicas=2")
    assert code == 0, said
    assert stage.faults(folder) == []
    assert len(list((folder / "dataset" / "data").iterdir())) == stage.SHARDS


def test_rows_that_kill_engines_are_rejected_with_their_reason_and_all_others_are_there(folder: Path) -> None:
    code, said = finish(folder, "fleet.max_rejected=0.05", poison=POISON)
    assert code == 0, said
    assert stage.faults(folder) == []
    rejected = stage.rejected_of(folder)
    assert sorted(rejected) == sorted(POISON)
    assert all("SIGKILL" in reason for reason in rejected.values())
    assert "row p007/1 is rejected" in said


def test_a_slot_that_kills_whatever_it_is_given_has_no_row_rejected_for_they_go_to_another(folder: Path) -> None:
    code, said = finish(folder, "fleet.replicas=2", "limit=2", broken=["0"])
    assert code == 0, said
    dataset = open_dataset(str(folder / "dataset"))
    assert (dataset.num_shards, dataset.num_rows, stage.rejected_of(folder)) == (1, 2 * stage.SAMPLES, {})
    assert said.count("replica 0 died") == 1


def test_a_row_is_rejected_by_one_slot_alone_when_the_others_are_given_up(folder: Path) -> None:
    settings = ("fleet.replicas=2", "limit=2", "fleet.max_rejected=0.5")
    code, said = finish(folder, *settings, cannot_load=["1"], poison=["p001/1"])
    assert code == 0, said
    assert list(stage.rejected_of(folder)) == ["p001/1"]
    assert "replica 1 is given up" in said and said.count("replica 0 died") == GUILTY


def test_more_rejected_rows_than_allowed_end_the_job(folder: Path) -> None:
    code, said = finish(folder, "fleet.max_rejected=0", poison=POISON)
    assert code == 65
    assert "1 row is rejected, and fleet.max_rejected = 0" in said and "Traceback" not in said
    assert "the last is p007/1: engines died of it" in said


def test_an_engine_that_hangs_is_killed_and_its_rows_are_made_by_the_next(folder: Path) -> None:
    code, said = finish(folder, "fleet.hang_s=2", stuck=["p011/2"])
    assert code == 0, said
    assert stage.faults(folder) == [] and stage.rejected_of(folder) == {}
    assert "died: silent for" in said


def test_after_an_engine_ran_out_of_memory_the_next_takes_fewer_rows_at_once(folder: Path) -> None:
    code, said = finish(folder, memory=5)
    assert code == 0, said
    assert stage.faults(folder) == [] and stage.rejected_of(folder) == {}
    assert "engines take at most 4 rows at once from now on" in said


def test_replicas_that_run_out_of_memory_together_take_fewer_rows_once_and_not_once_each(folder: Path) -> None:
    code, said = finish(folder, "fleet.replicas=4", memory=5, step_s=0.05)
    assert code == 0, said
    assert stage.faults(folder) == []
    assert "at most 4 rows" in said and "at most 2 rows" not in said


def test_engines_that_never_come_to_work_end_the_job_and_it_can_be_resumed(folder: Path) -> None:
    code, said = finish(folder, cannot_load=["0"])
    assert code == 75
    assert "3 engines died one after another" in said and "the driver is not there" in said and "Traceback" not in said
    assert finish(folder)[0] == 0
    assert stage.faults(folder) == []


def test_sigterm_lets_shards_in_flight_finish_and_takes_no_more(folder: Path) -> None:
    with running(folder, step_s=0.05) as process:
        await_commits(folder, process, 2)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped by SIGTERM" in said and "The same command resumes" in said and "Traceback" not in said
    done = committed(folder)
    assert 2 < done < stage.SHARDS
    code, said = finish(folder)
    assert code == 0, said
    assert re.findall(r"(\d+/\d+) shards", said)[0] == f"{done}/{stage.SHARDS}", "the first line knows what is done"
    assert stage.faults(folder) == []


def test_sigterm_during_the_last_shard_lets_it_finish_and_begins_nothing_after_it(folder: Path) -> None:
    with running(folder, "limit=2", step_s=0.5) as process:
        assert process.stderr is not None
        while ": running" not in process.stderr.readline():
            assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=60) == 143
    assert committed(folder) == 1 and not (folder / "dataset" / "MANIFEST.json").exists()
    assert finish(folder, "limit=2")[0] == 0


def test_sigterm_without_grace_ends_at_once_and_keeps_what_is_committed(folder: Path) -> None:
    with running(folder, "fleet.grace_s=0", step_s=0.05) as process:
        await_commits(folder, process, 1)
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 143
    assert finish(folder)[0] == 0
    assert stage.faults(folder) == []


def test_workers_and_their_engines_end_with_their_supervisor_whatever_kills_it(folder: Path) -> None:
    with running(folder, "fleet.replicas=2", step_s=0.2) as process:
        orphans: list[psutil.Process] = []
        while len(orphans) < 4:  # both have their engines, which they start one after the other
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
            orphans = [below for worker in workers(process) for below in (worker, *worker.children())]
        await_commits(folder, process, 1)
        process.kill()
        gone, alive = psutil.wait_procs(orphans, timeout=10)
    assert len(gone) == 4 and not alive


class Nowhere:
    """A cluster that has lost its last node."""

    def slots(self) -> Sequence[Slot]:
        return ()

    def start(self, slot: Slot) -> Replica:
        raise AssertionError("there is no slot")

    def wait(self, replicas: Sequence[Replica], seconds: float) -> None:
        time.sleep(seconds)


def test_a_cluster_without_a_place_is_waited_for_and_then_given_up(folder: Path) -> None:
    config = load_section(Generate, None, "rollouts", [*stage.settings(folder), "fleet.startup_s=0.5"])
    with pytest.raises(RetryLater, match="no place for an engine"):
        make_rollouts("rollouts", config, load_prompts(config.prompts), launcher=Nowhere())
