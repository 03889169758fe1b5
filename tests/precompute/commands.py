"""`lopd precompute` as a user runs it: in its own process or, where no engine may start, by the same entry in ours."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from common import cli

ROOT = Path(__file__).parents[2]
SMALL_ENGINE = ("dtype=float32", "max_num_seqs=16", "cpu_kv_gib=0.1")


def start(*words: str) -> subprocess.Popen[str]:
    """Start `lopd precompute <words>` at the head of a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "common.cli", "precompute", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(*words: str) -> subprocess.CompletedProcess[str]:
    """Run `lopd precompute <words>` to its end."""
    process = start(*words)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def run_words(
    model: Path | str, prompts: Path, cache: str, *more: str, engine: Sequence[str] = SMALL_ENGINE
) -> list[str]:
    """Arguments of `run` with a small float32 engine for both phases."""
    settings = [f"{phase}.engine.{setting}" for phase in ("rollouts", "score") for setting in engine]
    return [
        "run", "--model", str(model), "--prompts", str(prompts), "--cache", cache, *more,
        *(word for setting in settings for word in ("--set", setting)),
    ]  # fmt: skip


def refused(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and stderr of `lopd precompute <words>`, run here: nothing but the refusal may stand on stderr."""
    capfd.readouterr()
    code = cli.guard(lambda: cli.group.main(args=["precompute", *words], standalone_mode=False))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") or captured.err.startswith("Usage: ")
    assert "Traceback" not in captured.err
    return code, captured.err
