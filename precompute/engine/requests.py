"""What crosses the door to the engine: requests in, finished results out, and the two things an engine can do."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from common.errors import DataError, RetryLater

MEMORY_TEXTS = (
    "out of memory",
    "outofmemory",
    "memoryerror",
    "allocate memory",
    "cublas_status_alloc_failed",
    "no available memory for the cache blocks",
    "larger than the available kv cache memory",
    "less than requested memory for kv",
    "free memory on device",  # less than vLLM was told to plan with: another process has it, or has not yet let go
)
"""What is said, in any case of letters, by PyTorch, CUDA, a CPU's allocator and vLLM when there is no memory left."""


class EngineDied(RetryLater):
    """The engine is gone, or cannot be trusted any more: this process must end, and another may do better.

    Args:
        out_of_memory: whether it is known that memory ran out. An engine in a process of its own takes the reason with
            it and leaves it only in what that process printed.
    """

    def __init__(self, what: str, *, out_of_memory: bool = False, where: str = "", fix: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.out_of_memory = out_of_memory


class RequestRefused(DataError):
    """The engine will not take a request, and lives on."""


def memory_ran_out(said: str) -> bool:
    """Whether an error, or what a dead process printed, says that memory ran out."""
    lowered = said.lower()
    return any(text in lowered for text in MEMORY_TEXTS)


@dataclass(frozen=True)
class GenerateRequest:
    """Continue `prompt_ids`; `key` finds its way back, `seed` alone decides the sample, `uid` names it in messages."""

    key: Any
    prompt_ids: list[int]
    seed: int
    uid: str


@dataclass(frozen=True)
class Generation:
    """A sampled completion."""

    key: Any
    completion_ids: np.ndarray  # (tokens,) int32, the stop token included
    logprobs: np.ndarray  # (tokens,) float32 nats, under the distribution that sampled
    finish_reason: str
    topk_ids: np.ndarray | None = None  # (tokens, k) int32, most likely first under the policy


@dataclass(frozen=True)
class ScoreRequest:
    """Grade every token of `completion_ids` after `prompt_ids`, and at each position the `topk_ids` that are given.

    `uid` names the row in messages.
    """

    key: Any
    prompt_ids: np.ndarray  # (prompt,) int32
    completion_ids: np.ndarray  # (tokens,) int32
    uid: str
    topk_ids: np.ndarray | None = None  # (tokens, k) int32; None to be given the engine's own most likely ones, if any


@dataclass(frozen=True)
class Scores:
    """Log-probs of the completion's tokens at temperature 1. None where the engine failed to give them."""

    key: Any
    logprobs: np.ndarray | None  # (tokens,) float32 nats
    topk_ids: np.ndarray | None = None  # (tokens, k) int32: those given, else the most likely first
    topk_logprobs: np.ndarray | None = None  # (tokens, k) float32 nats


class Generator(Protocol):
    """What `precompute.generate` needs of an engine."""

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Generation]: ...


class Scorer(Protocol):
    """What `precompute.score` needs of an engine."""

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]: ...


class Watch(Protocol):
    """Who wants to know what an engine is about, because it may die of it."""

    def entering(self, uids: Sequence[str]) -> None:
        """These rows are about to be given to the engine, all at once."""
        ...

    def refused(self, uid: str, reason: str) -> None:
        """The engine will not take this row: nothing comes of it."""
        ...

    def dying(self) -> None:
        """The engine is gone, a call to it will never return, and this process ends as soon as this does.

        Called in another thread than the others.
        """
        ...

    def stepped(self) -> None:
        """The engine made a step. What this raises ends the stream, and the engine lets go of its rows."""
        ...
