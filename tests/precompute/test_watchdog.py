"""vLLM's engine, a process of its own, is killed in the midst of its work: another takes its place."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from common.dataset import open_dataset
from tests.precompute.commands import SMALL_ENGINE, start
from tests.precompute.conftest import Models

PROMPTS, SAMPLES = 4, 60


def _engine_of(process: int) -> int:
    """The process id of vLLM's engine below `process`."""
    [engine] = [child.pid for child in psutil.Process(process).children(recursive=True) if "EngineCor" in child.name()]
    return engine


@pytest.mark.slow
def test_a_killed_engine_is_replaced_and_the_dataset_comes_out_whole(
    models: Models, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    settings = [word for setting in SMALL_ENGINE for word in ("--set", f"engine.{setting}")]
    words = ["--model", str(models.student), "--prompts", str(prompts), "--cache", str(tmp_path / "cache")]
    size = ["--samples", str(SAMPLES), "--max-tokens", "64", "--set", "prompts_per_shard=1"]
    slow = ["--set", "engine.max_num_seqs=4"]  # so that shards come one after another, and work is left after the first
    command = start("rollouts", *words, *size, *settings, *slow)
    deadline = time.monotonic() + 180
    while not list(tmp_path.glob("cache/commits/*.json")) and command.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(_engine_of(command.pid), signal.SIGKILL)
    _, error = command.communicate(timeout=240)

    assert command.returncode == 0, error
    assert "replica 0 died" in error and "vLLM's engine died" in error and "Traceback" not in error
    dataset = open_dataset(str(tmp_path / "cache"))
    assert (dataset.num_rows, [shard.rejected for shard in dataset.shards]) == (PROMPTS * SAMPLES, [()] * PROMPTS)
