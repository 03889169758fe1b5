"""Whether the engines fit where they are to run; what is missing is told in bytes."""

from collections.abc import Sequence

from common.errors import UsageError
from common.host import free_memory, in_words
from precompute.checks.memory import PROCESS, Checkpoint, Need, need_of_gpu, need_of_host
from precompute.config import Engine
from precompute.fleet.devices import Gpu
from precompute.fleet.replica import Slot

MOST_GPUS = 16
"""Of one box: beyond, more GPUs a replica are not advised."""


def require_room(
    checkpoint: Checkpoint, engine: Engine, tokens: int, slots: Sequence[Slot], gpus: Sequence[Gpu]
) -> str:
    """What the engines take and what there is, in words.

    Args:
        tokens: the longest row, which the cache must hold at least once.
        gpus: of this box; none on a CPU.

    Raises:
        UsageError: a GPU or the host has too little; says how much is missing.
    """
    free = free_memory()
    if not gpus:
        return host_room(need_of_host(checkpoint, engine), len(slots), free)
    used = {index for slot in slots for index in slot.devices}
    need = need_of_gpu(checkpoint, engine, tokens, engine.tensor_parallel)
    said = [_gpu_room(gpu, need, engine, checkpoint, tokens) for gpu in gpus if gpu.index in used]
    processes = len(slots) * (1 + engine.tensor_parallel)
    if free is not None and free < processes * PROCESS:
        raise UsageError(
            f"{processes} processes take about {in_words(processes * PROCESS)} of the host's memory, of which "
            f"{in_words(free)} are free: {in_words(processes * PROCESS - free)} are missing",
            fix="Take fewer replicas (fleet.replicas), or a box with more memory",
        )
    return said[0]


def host_room(need: Need, replicas: int, free: int | None) -> str:
    """The same of replicas that run on the CPU."""
    each = f"{in_words(need.total)} a replica (weights {in_words(need.weights)}, KV cache {in_words(need.cache)})"
    total = replicas * need.total
    if free is not None and total > free:
        most = free // need.total
        raise UsageError(
            f"no room for the model: {replicas} x {each} of the host's memory, of which {in_words(free)} are free; "
            f"{in_words(total - free)} are missing",
            fix=f"Set fleet.replicas to {most}" if most else "Lower engine.cpu_kv_gib, or take a larger machine",
        )
    return f"{each}, {in_words(free) if free is not None else 'an unknown amount'} of the host is free"


def _gpu_room(gpu: Gpu, need: Need, engine: Engine, checkpoint: Checkpoint, tokens: int) -> str:
    share = engine.gpu_memory_utilization
    budget = int(share * gpu.total)
    each = f"{in_words(need.total)} (weights {in_words(need.weights)}, KV cache of a row {in_words(need.cache)})"
    if need.total > budget:
        raise UsageError(
            f"no room for the model: it takes {each} of each GPU, and may take {in_words(budget)} "
            f"({share:g} of {in_words(gpu.total)}); {in_words(need.total - budget)} are missing",
            where=f"GPU {gpu.index}, {gpu.name}",
            fix=_more_gpus(engine, checkpoint, tokens, budget),
        )
    if budget > gpu.free:
        lower = int(100 * gpu.free / gpu.total) / 100
        raise UsageError(
            f"the GPU is not free: engine.gpu_memory_utilization = {share:g} asks for {in_words(budget)} of it, "
            f"{in_words(gpu.free)} are left; {in_words(budget - gpu.free)} are missing",
            where=f"GPU {gpu.index}, {gpu.name}",
            fix="End what runs there (`nvidia-smi`)"
            + (f", or lower it to {lower:g}" if need.total <= lower * gpu.total else ""),
        )
    return f"{each} at least, of {in_words(budget)} on each GPU"


def _more_gpus(engine: Engine, checkpoint: Checkpoint, tokens: int, budget: int) -> str:
    span = 2 * engine.tensor_parallel
    while span <= MOST_GPUS:
        if need_of_gpu(checkpoint, engine, tokens, span).total <= budget:
            return f"Set engine.tensor_parallel to {span}"
        span *= 2
    return "Take GPUs with more memory, or a quantised checkpoint"
