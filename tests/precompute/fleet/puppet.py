"""A worker as it is, but for vLLM: its engine makes rows of a request's seed at once, and dies or hangs as it is told.

So the supervisor can be shown hundreds of deaths in the time in which vLLM loads a model twice. Like vLLM's, its engine
has a core, a process of its own that holds the device and notices nobody's death.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np

from precompute import tasks, worker
from precompute.engine import door
from precompute.engine.requests import EngineDied, GenerateRequest, Generation, ScoreRequest, Scores
from precompute.generate import seed_of

Request = TypeVar("Request", GenerateRequest, ScoreRequest)
Result = TypeVar("Result")
CORE = ("sleep", "3600")
REFUSAL = "vLLM refuses a request: it says why"
SCRIPT = "PUPPET_SCRIPT"
"""Environment variable: a JSON file of `Script`'s fields."""


class Script:
    """What goes wrong."""

    def __init__(self) -> None:
        told = json.loads(Path(os.environ[SCRIPT]).read_text())
        self.poison: set[str] = set(told.get("poison", ()))
        """Uids of which the engine's process dies."""
        self.poison_scores: set[str] = set(told.get("poison_scores", ()))
        """The same for those that are scored."""
        self.refused: set[str] = set(told.get("refused", ()))
        """Uids that the engine will not take."""
        self.refused_scores: set[str] = set(told.get("refused_scores", ()))
        """The same for those that are scored."""
        self.stuck: set[str] = set(told.get("stuck", ()))
        """Uids with which a step does not end, the first time."""
        self.memory: int | None = told.get("memory")
        """Rows that fit into its memory at once."""
        self.broken: set[str] = set(told.get("broken", ()))
        """Slots on which an engine's process dies of whatever it is given."""
        self.cannot_load: set[str] = set(told.get("cannot_load", ()))
        """Slots on which no engine starts."""
        self.core_gone_after: float = told.get("core_gone_after", math.inf)
        """Rows after which vLLM's engine process is gone, and the step of who waits for it never ends."""
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
        self._script, self.watch, self.window = Script(), watch, window
        self.waiting, self.engine_dead, self._made = False, False, 0
        if slot_name() in self._script.cannot_load:
            raise EngineDied("the driver is not there")
        self._core = subprocess.Popen(CORE)
        Thread(target=door._watch, args=(weakref.ref(self), self), daemon=True).start()

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Generation]:
        return self._stream(requests, completion, self._script.poison, self._script.refused)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        return self._stream(requests, grades, self._script.poison_scores, self._script.refused_scores)

    def close(self) -> None:
        self._core.kill()
        self._core.wait()

    def _stream(
        self, requests: Iterable[Request], result: Callable[[Request], Result], poison: set[str], refuses: set[str]
    ) -> Iterator[Result]:
        source, inside = iter(requests), list[Request]()
        while True:
            fresh = list(islice(source, self.window - len(inside)))
            if fresh:
                self.watch.entering([request.uid for request in fresh])
            refused = [request for request in fresh if request.uid in refuses]
            for request in refused:
                self._script.first_time(request.uid)
                self.watch.refused(request.uid, REFUSAL)
            inside += [request for request in fresh if request not in refused]
            if not inside and not fresh:
                return
            if not inside:
                continue
            self._suffer([request.uid for request in inside], poison)
            time.sleep(self._script.step_s)
            self.watch.stepped()
            self._made += 1
            yield result(inside.pop(len(inside) // 2))

    def _suffer(self, inside: list[str], poison: set[str]) -> None:
        script = self._script
        if self._core.poll() is not None:
            raise EngineDied("its core is gone")
        if script.memory is not None and len(inside) > script.memory:
            raise EngineDied("CUDA out of memory", out_of_memory=True)
        if self._made >= script.core_gone_after:
            self.waiting = self.engine_dead = True
            time.sleep(3600)
        for uid in inside:
            if uid in poison or slot_name() in script.broken:
                os.kill(os.getpid(), signal.SIGKILL)
            if uid in script.stuck and script.first_time(uid):
                time.sleep(3600)


def met(folder: Path) -> int:
    """How many rows an engine has met, of those that it will not take or that it hangs with."""
    return len(list(folder.glob("met-*")))


def slot_name() -> str:
    """The slot of this process, of which only the name of its log speaks."""
    return Path("/proc/self/fd/2").readlink().stem.partition("-")[2]


def completion(request: GenerateRequest) -> Generation:
    """What this engine samples: of the seed alone, as an engine should."""
    generator = np.random.default_rng(request.seed)
    tokens = int(generator.integers(1, 20))
    ids = generator.integers(0, 256, tokens).astype(np.int32)
    logprobs = -generator.exponential(1.0, tokens).astype(np.float32)
    return Generation(request.key, ids, logprobs, "stop")


def grades(request: ScoreRequest) -> Scores:
    """How this engine grades: by the row's name alone."""
    prompt, _, sample = request.uid.rpartition("/")
    made = completion(GenerateRequest(None, [], seed_of(0, prompt, int(sample)), request.uid))
    return Scores(request.key, np.float32(0.9) * made.logprobs)


if __name__ == "__main__":
    tasks.Engine = PuppetEngine  # pyright: ignore[reportAttributeAccessIssue]
    worker.main(int(sys.argv[1]))
