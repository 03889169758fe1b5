"""What an action costs: CPU seconds and peak memory, in a process of its own.

CPU seconds, all threads of the process together, are what a shared machine can measure: they hardly move when
something else runs beside. Memory is the high-water mark of the process above what it held before; it is told by
Linux, so this runs on Linux alone.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

Result = TypeVar("Result")
RESET_PEAK = "5"
"""Written to /proc/self/clear_refs: the high-water mark starts anew (man 5 proc)."""


@dataclass
class Cost:
    """Of one action; filled when it ends."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    """Above what the process held when the action began."""


def in_fresh_process(action: Callable[..., Result], *arguments: Any) -> Result:
    """The result of `action`, a function of a module, in a new interpreter that ends with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(action, *arguments).result()


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure the body. What was freed before is given back first, or the body would find its memory already there."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before, cost = _status("VmRSS"), Cost()
    began, cpu_began = time.monotonic(), time.process_time()
    yield cost
    cost.cpu_seconds, cost.seconds = time.process_time() - cpu_began, time.monotonic() - began
    cost.peak_bytes = _status("VmHWM") - before


def _status(key: str) -> int:
    """Bytes that /proc/self/status names under `key`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
