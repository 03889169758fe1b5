"""A worker as it is, but for vLLM: its engine makes rows of a request's seed at once, and dies or hangs as it is told.

So the supervisor can be shown hundreds of deaths in the time in which vLLM loads a model twice.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from precompute import tasks, worker
from precompute.engine.requests import EngineDied, GenerateRequest, Generation
from precompute.fleet.messages import Job

SCRIPT = "PUPPET_SCRIPT"
"""Environment variable: a JSON file of `Script`'s fields."""


class Script:
    """What goes wrong."""

    def __init__(self) -> None:
        told = json.loads(Path(os.environ[SCRIPT]).read_text())
        self.poison: set[str] = set(told.get("poison", ()))
        """Uids of which the engine's process dies."""
        self.stuck: set[str] = set(told.get("stuck", ()))
        """Uids with which a step does not end, the first time."""
        self.memory: int | None = told.get("memory")
        """Rows that fit into its memory at once."""
        self.cannot_load: bool = told.get("cannot_load", False)
        self.step_s: float = told.get("step_s", 0.002)
        self.folder = Path(os.environ[SCRIPT]).parent

    def first_time(self, uid: str) -> bool:
        """Whether no engine has met this row before."""
        try:
            (self.folder / f"met-{uid.replace('/', '-')}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class PuppetEngine:
    """Stands where `precompute.engine.door.Engine` does."""

    def __init__(self, folder: Path, config: Any, *, watch: Any, window: int, **rest: Any) -> None:
        self._script, self._watch, self.window = Script(), watch, window
        if self._script.cannot_load:
            raise EngineDied("the driver is not there")

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Generation]:
        source, inside = iter(requests), list[GenerateRequest]()
        while True:
            fresh = list(islice(source, self.window - len(inside)))
            if fresh:
                self._watch.entering([request.uid for request in fresh])
            inside += fresh
            if not inside:
                return
            self._suffer(inside)
            time.sleep(self._script.step_s)
            self._watch.stepped()
            yield completion(inside.pop(len(inside) // 2))

    def close(self) -> None:
        pass

    def _suffer(self, inside: list[GenerateRequest]) -> None:
        script = self._script
        if script.memory is not None and len(inside) > script.memory:
            raise EngineDied("CUDA out of memory", out_of_memory=True)
        for request in inside:
            if request.uid in script.poison:
                os.kill(os.getpid(), signal.SIGKILL)
            if request.uid in script.stuck and script.first_time(request.uid):
                time.sleep(3600)


def completion(request: GenerateRequest) -> Generation:
    """What this engine samples: of the seed alone, as an engine should."""
    generator = np.random.default_rng(request.seed)
    tokens = int(generator.integers(1, 20))
    ids = generator.integers(0, 256, tokens).astype(np.int32)
    logprobs = -generator.exponential(1.0, tokens).astype(np.float32)
    return Generation(request.key, ids, logprobs, "stop")


class PuppetTask(tasks.SamplingTask):
    """The task as it is; the name says whose engine it has."""

    def __init__(self, config: Any, job: Job, watch: Any) -> None:
        tasks.Engine = PuppetEngine  # pyright: ignore[reportAttributeAccessIssue]
        super().__init__(config, job, watch)


if __name__ == "__main__":
    worker.SamplingTask = PuppetTask
    worker.main(int(sys.argv[1]))
