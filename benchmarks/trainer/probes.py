"""What both sides measure of a training step, by the very same lines: where its time goes, and how much memory it
takes.

Nothing of ours is imported, so this runs in a peer's environment too. The step is watched through torch's own hooks,
which fire whoever wrote the trainer: a step lasts from the end of one optimizer step to the end of the next, so that
loading, logging and whatever else a trainer does in between count. Memory is Linux's count of resident pages.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

PHASES = ("data", "forward", "backward", "optimizer", "rest")
CLOCKS = {"wall": time.monotonic, "cpu": time.process_time}
RESET_PEAK = "5"
"""Written to /proc/self/clear_refs: the high-water mark starts anew (man 5 proc)."""


def resident_bytes(key: str = "VmRSS") -> int:
    """Resident bytes now, or at most with `VmHWM`, of this process and all below it."""
    return sum(_status(process, key) for process in _family())


def reset_peak() -> None:
    """Let the high-water marks of this process and of its GPU start anew."""
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """The high-water mark since: of the GPU where this process uses one, else of the host."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else resident_bytes("VmHWM")


def now(clock: Callable[[], float]) -> float:
    """The time at which what was asked of the GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock()


def _family() -> Iterator[str]:
    """Ids of this process and of all below it."""
    waiting = ["self"]
    while waiting:
        process = waiting.pop()
        yield process
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            waiting += children.read_text().split()


def _status(process: str, key: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


@dataclass
class StepWatch:
    """Watches every optimizer step of this process; `steps` fills as they end.

    Attributes:
        steps: of each step, the seconds of every phase, of all and of the teacher, and the peak of memory in it.
        teacher: a network whose forward pass is told apart, because the other side has none.
        clock: what tells the seconds; `time.process_time` on a machine that others use too, with one thread.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    teacher: nn.Module | None = None
    clock: Callable[[], float] = time.monotonic
    _spent: dict[str, float] = field(default_factory=dict)
    _running: dict[str, tuple[object, float]] = field(default_factory=dict)
    _last_end: float | None = None

    def begin(self, phase: str, by: object) -> None:
        """`by` begins `phase`; a phase already begun goes on."""
        if not self._running:
            self._spent.setdefault("data", now(self.clock) - (self._last_end or now(self.clock)))
        self._running.setdefault(phase, (by, now(self.clock)))

    def end(self, phase: str, by: object) -> None:
        """`by` ends `phase` if it began it."""
        owner, began = self._running.get(phase, (None, 0.0))
        if owner is by:
            del self._running[phase]
            self._spent[phase] = self._spent.get(phase, 0.0) + now(self.clock) - began

    def is_running(self, phase: str) -> bool:
        """Whether it is."""
        return phase in self._running

    def end_step(self) -> None:
        """The optimizer has stepped."""
        ended = now(self.clock)
        if self._last_end is not None:
            spent = {phase: self._spent.get(phase, 0.0) for phase in (*PHASES, "teacher")}
            spent["step"] = ended - self._last_end
            spent["rest"] = spent["step"] - sum(spent[phase] for phase in PHASES)
            self.steps.append({**spent, "peak_bytes": peak_bytes()})
        reset_peak()  # at first too: what loading took is no part of a step
        self._running.clear()  # a forward pass that ended in an error before the first step has not ended here
        self._spent, self._last_end = {}, now(self.clock)


@contextmanager
def watched(clock: Callable[[], float] = time.monotonic) -> Iterator[StepWatch]:
    """Watch the optimizer steps of the body. The first has no beginning, so it is not among `steps`: it warms up."""
    watch = StepWatch(clock=clock)
    hooks = [
        register_module_forward_pre_hook(lambda module, _: _forward_begins(watch, module)),
        register_module_forward_hook(lambda module, *_: _forward_ends(watch, module)),
        register_optimizer_step_pre_hook(lambda optimizer, *_: watch.begin("optimizer", optimizer)),
        register_optimizer_step_post_hook(lambda optimizer, *_: _stepped(watch, optimizer)),
    ]
    original = torch.autograd.backward
    torch.autograd.backward = _timed_backward(watch, original)  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield watch
    finally:
        torch.autograd.backward = original  # pyright: ignore[reportPrivateImportUsage]
        for hook in hooks:
            hook.remove()


def _forward_begins(watch: StepWatch, module: nn.Module) -> None:
    """Of the outermost network; what checkpointing recomputes belongs to the backward pass."""
    if not watch.is_running("backward"):
        watch.begin("forward", module)
        if module is watch.teacher:
            watch.begin("teacher", module)


def _forward_ends(watch: StepWatch, module: nn.Module) -> None:
    watch.end("teacher", module)
    watch.end("forward", module)


def _stepped(watch: StepWatch, optimizer: object) -> None:
    watch.end("optimizer", optimizer)
    watch.end_step()


def _timed_backward(watch: StepWatch, backward: Callable[..., None]) -> Callable[..., None]:
    def timed(*arguments: Any, **options: Any) -> None:
        owner = object()
        watch.begin("backward", owner)
        try:
            backward(*arguments, **options)
        finally:
            watch.end("backward", owner)

    return timed
