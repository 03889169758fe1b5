"""What happens when vLLM's engine, a process of its own, is killed in the midst of its work."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.precompute.commands import SMALL_ENGINE, start
from tests.precompute.conftest import Models

TRY_AGAIN = 75


def _engine_of(process: int) -> int:
    """The process id of vLLM's engine among the children of `process`."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    [engine] = [int(child) for child in children if "EngineCor" in Path(f"/proc/{child}/comm").read_text()]
    return engine


@pytest.mark.slow
def test_a_killed_engine_ends_the_command_with_one_line_and_keeps_what_is_committed(
    models: Models, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    settings = [word for setting in SMALL_ENGINE for word in ("--set", f"engine.{setting}")]
    words = ["--model", str(models.student), "--prompts", str(prompts), "--cache", str(tmp_path / "cache")]
    size = ["--samples", "500", "--max-tokens", "64", "--set", "prompts_per_shard=1"]
    command = start("rollouts", *words, *size, *settings)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("cache/commits/*.json")) and command.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(_engine_of(command.pid), signal.SIGKILL)
    _, error = command.communicate(timeout=60)

    assert command.returncode == TRY_AGAIN
    assert "error: vLLM's engine died" in error and "the same command resumes" in error
    assert "Traceback" not in error
    assert list(tmp_path.glob("cache/commits/*.json"))
