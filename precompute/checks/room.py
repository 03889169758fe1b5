"""Whether the engines fit where they are to run; what is missing is told in bytes."""

from collections.abc import Sequence
from typing import NoReturn

from common.errors import RetryLater, UsageError
from common.host import free_memory, in_words, whole_memory
from precompute.checks.memory import PROCESS, Checkpoint, Need, need_of_gpu, need_of_host
from precompute.config import Engine
from precompute.fleet.devices import Gpu
from precompute.fleet.replica import Slot

OTHERS = "End what else takes it, or run the same command again when that has ended"
SYSTEM = 3 << 29
"""Of the host, in bytes, at most: its system and this process. To wait for what they hold would be to wait for ever."""
DRIVER = 0.03
"""Share of a GPU that its driver keeps, at most: to wait for that would be to wait for ever."""
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
        UsageError: a GPU or the host has too little, or nobody can tell how much the host has for all; says how much
            is missing.
        RetryLater: it has enough, but others hold it.
    """
    free, whole = free_memory(), whole_memory()
    if not gpus:
        return host_room(need_of_host(checkpoint, engine), len(slots), free, whole)
    used = {index for slot in slots for index in slot.devices}
    need = need_of_gpu(checkpoint, engine, tokens, engine.tensor_parallel)
    said = [_gpu_room(gpu, need, engine, checkpoint, tokens) for gpu in gpus if gpu.index in used]
    processes = len(slots) * (1 + engine.tensor_parallel)
    total = processes * PROCESS
    if free is not None and free < total:
        what = (
            f"{processes} processes take about {in_words(total)} of the host's memory, of which "
            f"{in_words(free)} are free: {in_words(total - free)} are missing"
        )
        if _would_do(total, whole):
            raise RetryLater(what, fix=f"{OTHERS}. Fewer replicas (fleet.replicas) take less")
        raise UsageError(what, fix="Take fewer replicas (fleet.replicas), or a box with more memory")
    return said[0]


def host_room(need: Need, replicas: int, free: int | None, whole: int | None) -> str:
    """The same of replicas that run on the CPU.

    Args:
        free: bytes of the host's memory; None where nobody can tell.
        whole: bytes that would be free if nobody else took any; None as above.
    """
    each = f"{in_words(need.total)} a replica (weights {in_words(need.weights)}, KV cache {in_words(need.cache)})"
    total = replicas * need.total
    if free is not None and total > free:
        most = free // need.total
        what = (
            f"no room for the model: {replicas} x {each} of the host's memory, of which {in_words(free)} are free; "
            f"{in_words(total - free)} are missing"
        )
        less = f"Set fleet.replicas to {most}" if most else "Lower engine.cpu_kv_gib"
        if _would_do(total, whole):
            raise RetryLater(what, fix=f"{OTHERS}. Or: {less[0].lower()}{less[1:]}")
        raise UsageError(what, fix=less if most else f"{less}, or take a larger machine")
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
        _refuse_share(gpu, need, share)
    return f"{each} at least, of {in_words(budget)} on each GPU"


def _refuse_share(gpu: Gpu, need: Need, share: float) -> NoReturn:
    """Say that the share of the GPU that is asked for is not free: others hold it, or nobody could ever have it."""
    budget, lower = int(share * gpu.total), int(100 * gpu.free / gpu.total) / 100
    what = (
        f"engine.gpu_memory_utilization = {share:g} asks for {in_words(budget)} of it, {in_words(gpu.free)} are left; "
        f"{in_words(budget - gpu.free)} are missing"
    )
    where = f"GPU {gpu.index}, {gpu.name}"
    if share > 1 - DRIVER:
        most = max(lower, 1 - DRIVER)
        raise UsageError(f"the GPU's driver keeps a part: {what}", where=where, fix=f"Lower the share to {most:g}")
    raise RetryLater(
        f"the GPU is not free: {what}",
        where=where,
        fix="End what runs there (`nvidia-smi`), or run the same command again when it has ended"
        + (f"; or lower the share to {lower:g}" if need.total <= lower * gpu.total else ""),
    )


def _would_do(total: int, whole: int | None) -> bool:
    """Whether so much would be there if nobody else took any but the system, which never gives all of it."""
    return whole is not None and total + SYSTEM <= whole


def _more_gpus(engine: Engine, checkpoint: Checkpoint, tokens: int, budget: int) -> str:
    span = 2 * engine.tensor_parallel
    while span <= MOST_GPUS:
        if need_of_gpu(checkpoint, engine, tokens, span).total <= budget:
            return f"Set engine.tensor_parallel to {span}"
        span *= 2
    return "Take GPUs with more memory, or a quantised checkpoint"
