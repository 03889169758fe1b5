"""An engine that is a process of its own, as on a GPU, and does not start: only what it printed says why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from precompute.engine.requests import memory_ran_out
from tests.precompute import tiny
from tests.precompute.commands import ROOT

LOAD = """
import sys
from pathlib import Path
from precompute.config import Engine as Config, Sampling
from precompute.engine.door import Engine
from precompute.engine.requests import EngineDied

if __name__ == "__main__":
    try:
        Engine(Path(sys.argv[1]), Config(cpu_kv_gib=1e6), max_model_len=64, sampling=Sampling())
    except EngineDied as error:
        print(error)
"""


@pytest.mark.slow
def test_an_engine_that_does_not_start_has_died_and_what_it_printed_tells_that_memory_ran_out(tmp_path: Path) -> None:
    tiny.make_teacher(tmp_path / "model")
    (tmp_path / "load.py").write_text(LOAD)
    loading = subprocess.run(
        [sys.executable, tmp_path / "load.py", tmp_path / "model"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "vLLM's engine did not start" in loading.stdout, loading.stderr
    assert memory_ran_out(loading.stderr)
