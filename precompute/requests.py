"""What crosses the door to the engine: requests in, finished results out, and the two things an engine can do."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


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


@dataclass(frozen=True)
class ScoreRequest:
    """Grade every token of `completion_ids` after `prompt_ids`."""

    key: Any
    prompt_ids: np.ndarray  # (prompt,) int32
    completion_ids: np.ndarray  # (tokens,) int32


@dataclass(frozen=True)
class Scores:
    """Log-probs of the completion's tokens at temperature 1. None where the engine failed to give them."""

    key: Any
    logprobs: np.ndarray | None  # (tokens,) float32 nats
    topk_ids: np.ndarray | None = None  # (tokens, k) int32, most likely first
    topk_logprobs: np.ndarray | None = None  # (tokens, k) float32 nats


class Generator(Protocol):
    """What `precompute.generate` needs of an engine."""

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Generation]: ...


class Scorer(Protocol):
    """What `precompute.score` needs of an engine."""

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]: ...
