"""When a side gave its engine each request and when each left it, noted by the same lines on every side.

Nothing but Python's own library is imported: `probe/sitecustomize.py` loads this into every process of a side, which
vLLM's own methods then pass through. A line an event, on the clock that all processes of a machine share.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

VARIABLE = "BENCHMARK_EVENTS"
"""Names the file."""
WATCHED = "vllm.v1.engine.llm_engine"


@dataclass(frozen=True)
class Events:
    """What one side did; moments are seconds of the monotonic clock."""

    first_in: float
    """When the first request was given to the engine."""
    given: int
    """Requests."""
    out: Sequence[tuple[float, int, int]]
    """Of each row that left the engine, in order: when, its tokens with its prompt, and those sampled."""

    @property
    def last_out(self) -> float:
        """When the last row left the engine."""
        return self.out[-1][0]

    @property
    def sampled(self) -> int:
        """Tokens of all rows."""
        return sum(sampled for _, _, sampled in self.out)

    def share_after(self, rows: int) -> float:
        """The part of all tokens that is in the rows after the first so many."""
        lengths = [length for _, length, _ in self.out]
        return sum(lengths[rows:]) / sum(lengths)


def note(kind: str, length: int = 0, sampled: int = 0) -> None:
    """Note that a request was `given`, or has `finished`: its tokens with its prompt, and those sampled."""
    _file().write(f"{time.monotonic():.6f} {kind} {length} {sampled}\n")


def read_events(file: Path) -> Events | None:
    """What was noted in `file`; None when no request was given or none finished."""
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    given = [float(moment) for moment, kind, _, _ in lines if kind == "given"]
    out = [(float(moment), int(length), int(sampled)) for moment, kind, length, sampled in lines if kind == "finished"]
    return Events(min(given), len(given), sorted(out)) if given and out else None


def watch_vllm() -> None:
    """From now on, note what goes through vLLM's engine in this process, once it is imported."""
    if VARIABLE in os.environ:
        sys.meta_path.insert(0, _Finder())


@lru_cache(maxsize=1)
def _file() -> TextIO:
    return open(os.environ[VARIABLE], "a", buffering=1)  # a line is written at once: a worker may be killed


class _Finder(MetaPathFinder):
    """Finds vLLM's engine as Python would, with our loader around its own."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        engine: Any = vars(module)["LLMEngine"]
        engine.add_request, engine.step = _noting_given(engine.add_request), _noting_finished(engine.step)


def _noting_given(add_request: Any) -> Any:
    @wraps(add_request)
    def noting(*arguments: Any, **named: Any) -> Any:
        note("given")
        return add_request(*arguments, **named)

    return noting


def _noting_finished(step: Any) -> Any:
    @wraps(step)
    def noting(engine: Any) -> Any:
        outputs = step(engine)
        for output in outputs:
            if output.finished:
                sampled = sum(len(completion.token_ids) for completion in output.outputs)
                note("finished", len(output.prompt_token_ids) + sampled, sampled)
        return outputs

    return noting
