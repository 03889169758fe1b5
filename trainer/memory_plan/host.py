"""The memory plan of the host, what this machine has, and whether a plan fits it."""

import re
from dataclasses import dataclass

import torch

from common.errors import UsageError
from common.host import free_memory, in_words
from trainer.config import TrainConfig
from trainer.memory_plan.device import BYTES, CUDA_ITSELF, F32, Line, Plan, Ranks, Weights, sharded, state_lines

HOST_MOMENTS = ("load", "train", "save", "export")
PROCESS = 1 << 30
"""Allowance for Python and its libraries, in every process."""


@dataclass(frozen=True)
class Machine:
    """Bytes that a run may take; None where nobody can tell."""

    device: int | None
    """Of one GPU."""
    host: int | None
    """Of one node's RAM."""


def host_plan(weights: Weights, config: TrainConfig, ranks: Ranks, device: Plan, reader: int) -> Plan:
    """What one node's host memory holds; of the nodes that of rank 0, the fullest.

    Args:
        device: a CPU's device is the host itself, so its peak counts here too.
        reader: bytes of shards that one rank's reader holds.
    """
    whole = sum(each.count * each.held for each in weights.all)
    exported = sum(each.count for each in weights.all) * BYTES[config.export_dtype]
    exported += F32 * max(each.count for each in weights.all)  # gathered one by one, cast when here
    state = sum(line.at["save"] for line in state_lines(weights, ranks, ["save"]))
    saved = state - F32 * sum(sharded(each, ranks.shards) for each in weights.all if each.trains)
    lines = [
        Line("Python and libraries", dict.fromkeys(HOST_MOMENTS, ranks.here * PROCESS)),
        Line("the reader's shards", dict.fromkeys(("train", "save"), ranks.here * reader), "a lower shuffle_shards"),
        Line("rank 0's full copy", {"load": whole, "export": exported}, "a machine with more memory"),
        Line("copy of a checkpoint being written", {"save": ranks.here * saved}, "more machines for the same ranks"),
    ]
    if ranks.kind == "cpu":
        load = sum(sharded(each, ranks.shards) * each.held for each in weights.all)
        steady = {"load": load, "train": device.peak, "save": saved, "export": saved}
        lines.append(Line("training itself", {name: ranks.here * size for name, size in steady.items()}))
    if config.cpu_offload:
        lines += [_times(line, ranks.here) for line in state_lines(weights, ranks, HOST_MOMENTS)]
    return Plan(tuple(lines), HOST_MOMENTS)


def _times(line: Line, many: int) -> Line:
    return Line(line.name, {moment: many * size for moment, size in line.at.items()}, line.change)


def this_machine(kind: str) -> Machine:
    """What is free here and now: of the current CUDA device, and of the RAM that this container may use."""
    return Machine(torch.cuda.mem_get_info()[0] if kind == "cuda" else None, free_memory())


def elsewhere(device: str | None, host: str | None) -> Machine | None:
    """The machine that somebody plans for, in words; None for this one."""
    if device is None and host is None:
        return None
    return Machine(bytes_of(device) if device else None, bytes_of(host) if host else None)


def require_room(device: Plan, host: Plan, machine: Machine, kind: str) -> None:
    """Refuse what cannot fit, naming what takes most and what changes it.

    Raises:
        UsageError: the device or the host has less than the plan's fullest moment takes.
    """
    needed = device.peak + (CUDA_ITSELF if kind == "cuda" else 0)
    if kind == "cuda" and machine.device is not None and needed > machine.device:
        raise _too_much(device, "a rank's device", needed, machine.device)
    if machine.host is not None and host.peak > machine.host:
        raise _too_much(
            device if kind == "cpu" and host.fullest == "train" else host, "the host", host.peak, machine.host
        )


def bytes_of(text: str) -> int:
    """80GiB -> 85899345920; units of 1024 (`GiB`, `G`) and of 1000 (`GB`), and the same of K, M and T."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(iB|B|)\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is no amount of memory", fix="Write it as 80GiB or 192GB")
    base = 1000 if match[3].upper() == "B" else 1024
    return int(float(match[1]) * base ** ("KMGT".index(match[2].upper()) + 1))


def _too_much(plan: Plan, what: str, needed: int, there: int) -> UsageError:
    moment = plan.fullest
    alive = [line for line in plan.lines if line.at.get(moment, 0)]
    most = sorted(alive, key=lambda line: -line.at[moment])
    ways = dict.fromkeys(line.change for line in most if line.change)
    return UsageError(
        f"{what} needs {in_words(needed)} at its fullest moment and has {in_words(there)}",
        where=f"{moment}: {most[0].name} take {in_words(most[0].at[moment])}",
        fix=f"Take {', or '.join([*ways][:3])}",
    )
