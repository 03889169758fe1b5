"""A dataset made on a real Ray cluster of several nodes, one of which is killed: as if nothing had happened."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from common.dataset import open_dataset
from tests.precompute import tiny
from tests.precompute.commands import ROOT, finish, start
from tests.precompute.conftest import Models
from tests.precompute.fleet.ray_nodes import LOOPBACK

pytestmark = pytest.mark.slow

PROMPTS, SAMPLES = 24, 2
WORKER = "precompute.worker"
ONE_AT_A_TIME = ("dtype=float32", "max_num_seqs=1", "cpu_kv_gib=0.1")


class Nodes:
    """The cluster's keeper, which starts and kills nodes."""

    def __init__(self, folder: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.precompute.fleet.ray_nodes"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_TMPDIR": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid, self.address = self._process.pid, self._answer()

    def add(self) -> str:
        return self._ask("add")

    def kill(self, node: str) -> None:
        assert self._ask(f"kill {node}") == "killed"

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@dataclass(frozen=True)
class Cluster:
    nodes: Nodes
    first: str
    second: str


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="ray")  # short: Ray's sockets lie in it, and their paths may have 107 characters
    nodes = Nodes(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**LOOPBACK, "RAY_ADDRESS": nodes.address}.items():
                patch.setenv(name, value)
            yield Cluster(nodes, nodes.add(), nodes.add())
    finally:
        nodes.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_node_that_is_killed_costs_a_dataset_nothing(models: Models, cluster: Cluster, tmp_path: Path) -> None:
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    on_ray, on_box = tmp_path / "ray", tmp_path / "box"
    process = start(*_rollouts(models, prompts, on_ray), "--on", "ray")
    try:
        _await(lambda: len(_workers(cluster.nodes.pid)) == 2 and any((on_ray / "commits").glob("*.json")), process)
        cluster.nodes.kill(cluster.second)
        _, said = process.communicate(timeout=300)
    finally:
        _end(process)
    assert process.returncode == 0, said
    assert f"-{cluster.second[:6]} is lost: its node is gone" in said
    assert finish(*_rollouts(models, prompts, on_box)).returncode == 0
    assert _rows(on_ray) == _rows(on_box)


def test_no_worker_outlives_a_supervisor_that_is_killed(models: Models, cluster: Cluster, tmp_path: Path) -> None:
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    process = start(*_rollouts(models, prompts, tmp_path / "cache"), "--on", "ray")
    try:
        _await(lambda: bool(_workers(cluster.nodes.pid)), process)
        workers = _workers(cluster.nodes.pid)
    finally:
        _end(process)
    _await(lambda: not _alive(workers))


def _rollouts(models: Models, prompts: Path, cache: Path) -> list[str]:
    return [
        "rollouts", "--model", str(models.student), "--prompts", str(prompts), "--cache", str(cache),
        "--samples", str(SAMPLES), "--max-tokens", "64", "--set", "prompts_per_shard=1",
        *(word for setting in ONE_AT_A_TIME for word in ("--set", f"engine.{setting}")),
    ]  # fmt: skip


def _workers(keeper: int) -> list[psutil.Process]:
    """Those on the nodes of the cluster that this process keeps."""
    found = []
    for process in psutil.Process(keeper).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if WORKER in process.cmdline():
                found.append(process)
    return found


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def _await(happened: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"it ended with {process.returncode}: {process.communicate()[1]}")
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _rows(cache: Path) -> list[dict[str, object]]:
    dataset = open_dataset(str(cache))
    return [row for shard in range(dataset.num_shards) for row in dataset.read_shard(shard).to_pylist()]
