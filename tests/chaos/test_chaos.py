import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("--kills", "10", "--faults", "40", "--shards", "20", "--shards-per-dataset", "8")
NAIVE = ("--kills", "5", "--faults", "15", "--shards", "20", "--interrupts", "0.7", "--requests-per-blow", "8")


def run_chaos(*options: str, module: str = "tests.chaos") -> tuple[int, dict[str, int], str]:
    """Exit code of a short run, the rows of its table, and all that it printed."""
    command = [sys.executable, "-m", module, *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    rows = dict(re.findall(r"^ +(\S.*?) {2,}(\d+)$", result.stdout, re.MULTILINE))
    return result.returncode, {name: int(count) for name, count in rows.items()}, result.stdout + result.stderr


@pytest.mark.slow
def test_workers_that_are_killed_on_a_store_that_fails_lose_nothing() -> None:
    code, rows, printed = run_chaos(*OURS)

    assert code == 0, printed
    assert rows["kills (SIGKILL)"] >= 10 and rows["faults"] >= 40 and rows["reads of a shard by the readers"] > 0
    assert (rows["lost"], rows["duplicated"], rows["corrupt accepted"]) == (0, 0, 0)
    assert (rows["processes: foreign error"], rows["processes: hung"]) == (0, 0)


@pytest.mark.slow
def test_a_naive_writer_loses_data_in_the_same_run() -> None:
    code, rows, printed = run_chaos(*NAIVE, "--writer", "naive", "--must-lose")

    assert code == 0, printed
    assert rows["lost"] + rows["corrupt accepted"] > 0


@pytest.mark.slow
def test_boxes_that_vanish_while_they_sample_and_score_leave_what_an_undisturbed_one_makes() -> None:
    code, rows, printed = run_chaos("--kills", "5", "--requests-per-blow", "20", module="tests.chaos.precompute")

    assert code == 0, printed
    assert rows["blows"] == 5 and rows["command finished"] >= 2 and rows["that failed"] > 0
    assert (rows["lost"], rows["duplicated"], rows["corrupt"], rows["processes left behind"]) == (0, 0, 0, 0)
