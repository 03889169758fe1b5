"""A worker, on a puppet engine: when its shards, once they have left the engine, are verified and stored."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from common.config import load_section
from common.dataset_writer import create_dataset
from common.prompts import load_prompts
from precompute.config import Generate
from precompute.engine.requests import memory_ran_out
from precompute.fleet.local import Box, LocalReplica
from precompute.fleet.messages import Committed, FromWorker, Note, Nothing, State, Want, Work
from precompute.fleet.replica import Slot
from precompute.jobs import job_of
from precompute.plan import plan_generation
from precompute.worker import UPLOADS_WAITING
from tests.precompute.commands import ROOT
from tests.precompute.fleet import stage
from tests.precompute.fleet.puppet import SCRIPT

pytestmark = pytest.mark.slow

SLOT = Slot("0", ())
SLOW = """
import sys, time
def judge(text, meta):
    time.sleep(0.6)
    sys.stderr.write("CUDA out of memory\\n")
    raise MemoryError
"""


@contextmanager
def at_work(folder: Path, shards: int, monkeypatch: pytest.MonkeyPatch, **script: Any) -> Iterator[LocalReplica]:
    """A worker that has its job, with a verifier that takes its time, fails and says that memory ran out."""
    stage.prepare(folder)
    (folder / "slow.py").write_text(SLOW)
    (folder / "script.json").write_text(json.dumps(script))
    for name, value in {SCRIPT: folder / "script.json", "PYTHONPATH": ROOT, "LOPD_CACHE_DIR": folder}.items():
        monkeypatch.setenv(name, str(value))
    size = [f"limit={shards * stage.PER_SHARD}", "filters.verifier_processes=1"]
    settings = [*stage.settings(folder), *size, f"filters.verifier={folder}/slow.py:judge"]
    config = load_section(Generate, None, "rollouts", settings)
    planned = plan_generation("rollouts", config, load_prompts(config.prompts, limit=config.limit))
    plan = create_dataset(config.cache, planned.plan).plan
    replica = Box([SLOT], folder / "logs", "tests.precompute.fleet.puppet").start(SLOT)
    try:
        job = job_of("rollouts", config, planned, plan, config.model)
        replica.send(job.model_copy(update={"window": 1}))  # one row after another, as they come
        yield replica
    finally:
        replica.kill()


def told_by(replica: LocalReplica, shards: int) -> list[FromWorker]:
    """All that it tells until it ends, while it is given the shards one after another."""
    told, left, deadline = list[FromWorker](), list(range(shards)), time.monotonic() + 120
    while True:
        ended = replica.ended()
        fresh = replica.receive()
        told += fresh
        for message in fresh:
            if isinstance(message, Want):
                replica.send(Work(shard=left.pop(0)) if left else Nothing(ended=message.idle))
        if ended is not None:
            return told
        assert time.monotonic() < deadline, told
        time.sleep(0.05)


def test_while_a_shard_is_verified_its_worker_tells_how_far_it_is_and_what_the_verifier_prints_stands_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with at_work(tmp_path, 1, monkeypatch) as replica:
        told = told_by(replica, 1)
        words = replica.last_words()
    rows = stage.PER_SHARD * stage.SAMPLES
    states = [message.detail for message in told if isinstance(message, State) and "verified" in message.detail]
    assert len(states) >= 2 and len(set(states)) == len(states)
    [failed] = [message.text for message in told if isinstance(message, Note)]
    assert f"the verifier failed on {rows} of {rows} completions" in failed and "MemoryError" in failed
    assert not memory_ran_out(words)
    [log] = (tmp_path / "logs").glob("*-verifier-*.log")
    assert log.read_text().count("CUDA out of memory") == rows


def test_a_shard_that_is_whole_when_the_engines_process_dies_is_still_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = stage.PER_SHARD * stage.SAMPLES
    with at_work(tmp_path, 2, monkeypatch, core_gone_after=rows + 1) as replica:
        told = told_by(replica, 2)
        assert replica.ended() == "exit code 75" and "vLLM's engine died" in replica.last_words()
    assert [message.shard for message in told if isinstance(message, Committed)] == [0]


def test_shards_of_which_the_engine_takes_no_row_are_stored_as_they_come_and_do_not_pile_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = 4 * UPLOADS_WAITING
    prompts = range(shards * stage.PER_SHARD)
    refused = [f"p{prompt:03d}/{sample}" for prompt in prompts for sample in range(stage.SAMPLES)]
    with at_work(tmp_path, shards, monkeypatch, refused=refused) as replica:
        told = told_by(replica, shards)
    assert sum(isinstance(message, Committed) for message in told) == shards
    first = next(index for index, message in enumerate(told) if isinstance(message, Committed))
    asked = sum(isinstance(message, Want) for message in told[:first])
    assert asked <= UPLOADS_WAITING + 3, "those that wait, the one whose end has not come, the last, and the next"
