"""Which GPUs are ours, and how replicas share them out."""

import logging
from pathlib import Path

import pytest

from common.errors import RetryLater, UsageError
from precompute.config import Engine, Fleet
from precompute.fleet.devices import (
    Gpu,
    built_for_cpu,
    gpus_here,
    gpus_present,
    parse_gpus,
    slots,
    visible,
    visible_gpus,
)

ANSWER = """\
0, GPU-aa11, 81000, 81559, NVIDIA H100 80GB HBM3
1, GPU-aa22, 81000, 81559, NVIDIA H100 80GB HBM3
2, GPU-bb33, 500, 81559, NVIDIA H100 80GB HBM3
3, GPU-bb44, 81000, 81559, NVIDIA H100 80GB HBM3
"""
FOUR = parse_gpus(ANSWER)


def _devices(replicas: int | None, tensor_parallel: int, gpus: tuple[Gpu, ...] = FOUR) -> list[tuple[int, ...]]:
    shared_out = slots(Fleet(replicas=replicas), Engine(tensor_parallel=tensor_parallel), gpus)
    return [slot.devices for slot in shared_out]


def test_what_the_driver_prints_is_read_in_bytes() -> None:
    assert FOUR[2] == Gpu(2, "GPU-bb33", "NVIDIA H100 80GB HBM3", 500 << 20, 81559 << 20)
    assert parse_gpus("") == ()


@pytest.mark.parametrize("line", ["0, GPU-aa11, [N/A], 81559, H100", "0, [Unknown Error]", "Unable to determine"])
def test_a_gpu_of_which_the_driver_knows_nothing_stops_the_job(line: str) -> None:
    with pytest.raises(RetryLater, match="nvidia-smi says"):
        parse_gpus(ANSWER + line)


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (None, [0, 1, 2, 3]),
        ("2,0", [2, 0]),
        ("GPU-bb44,1", [3, 1]),
        ("GPU-bb3", [2]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices_says_which_are_ours(given: str | None, chosen: list[int]) -> None:
    assert [gpu.index for gpu in visible_gpus(FOUR, given)] == chosen


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("0,7", "7 is no GPU of this box .*there are 4 GPUs: 0,1,2,3"),
        ("GPU-aa", "GPU-aa is no GPU"),
        ("0,,1", "an empty name"),
        ("MIG-aa11", "a slice of a GPU"),
        ("1,GPU-aa22", "names a GPU twice"),
    ],
)
def test_a_gpu_that_is_not_here_is_an_error_and_not_the_end_of_the_list(given: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        visible_gpus(FOUR, given)


def _driver(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `nvidia-smi` that runs `script`, before all others."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(tmp_path, f'test "$2" = --format=csv,noheader,nounits && printf "%s" "{ANSWER}"', monkeypatch)
    assert gpus_present() == FOUR


def test_a_driver_without_gpus_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(tmp_path, "echo No devices were found; exit 6", monkeypatch)
    assert gpus_present() == ()


def test_a_driver_that_fails_is_told_and_not_taken_for_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(tmp_path, "echo Failed to initialize NVML: Driver/library version mismatch; exit 18", monkeypatch)
    with pytest.raises(RetryLater, match="fails: Failed to initialize NVML"):
        gpus_present()


@pytest.mark.skipif(not built_for_cpu(), reason="vLLM is built for GPUs here")
def test_a_vllm_that_is_built_for_the_cpu_leaves_gpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(tmp_path, f'printf "%s" "{ANSWER}"', monkeypatch)
    assert gpus_here({}) == ()


def test_replicas_share_out_all_gpus_unless_told_otherwise() -> None:
    assert _devices(None, 1) == [(0,), (1,), (2,), (3,)]
    assert _devices(None, 2) == [(0, 1), (2, 3)]
    assert _devices(2, 2, visible_gpus(FOUR, "3,1,0,2")) == [(3, 1), (0, 2)]


def test_gpus_that_stay_idle_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert _devices(None, 3) == [(0, 1, 2)]
    assert "GPU 3 stays idle: 3 of 4 are used" in caplog.text
    caplog.clear()
    assert _devices(1, 2) == [(0, 1)]
    assert "GPU 2,3 stays idle" in caplog.text


@pytest.mark.parametrize(
    ("replicas", "tensor_parallel", "said"),
    [
        (None, 8, r"tensor_parallel = 8, but there are 4 GPUs here \(GPU 0,1,2,3\).*4 at most, or .* 8 GPUs"),
        (3, 2, "3 replicas on 2 GPUs each need 6 GPUs, but there are 4.*fleet.replicas to 2 at most"),
        (5, 1, "5 replicas on 1 GPU each need 5 GPUs.*to 4 at most"),
    ],
)
def test_too_few_gpus_are_named_with_what_would_do(replicas: int | None, tensor_parallel: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        _devices(replicas, tensor_parallel)


def test_on_a_cpu_there_is_one_replica_unless_more_are_asked_for() -> None:
    assert [slot.name for slot in slots(Fleet(), Engine(), ())] == ["0"]
    assert [slot.name for slot in slots(Fleet(replicas=3), Engine(), ())] == ["0", "1", "2"]
    with pytest.raises(UsageError, match="tensor_parallel = 2, but there is no GPU here"):
        slots(Fleet(), Engine(tensor_parallel=2), ())


def test_a_worker_sees_the_gpus_of_its_slot_as_the_driver_counts_them() -> None:
    slot = slots(Fleet(), Engine(tensor_parallel=2), FOUR)[1]
    assert visible(slot) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "2,3"}
    assert visible(slots(Fleet(), Engine(), ())[0]) == {}
