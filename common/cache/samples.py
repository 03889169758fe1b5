"""Rows of a dataset as text, every piece with what teacher and rollout made of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from common.cache.tokens import Piece, pieces
from common.schema import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEPS = (0.5, 1.0, 2.0, 4.0)
"""Where the next deeper shade begins, in nats of teacher minus rollout log-prob, either way."""


@dataclass(frozen=True)
class Graded:
    """A piece of a completion and its log-probs, summed over its tokens, in nats."""

    text: str
    ids: tuple[int, ...]
    rollout: float
    teacher: float | None

    @property
    def gap(self) -> float | None:
        """Teacher minus rollout: below zero the teacher finds it worse. None before scoring."""
        return self.teacher - self.rollout if self.teacher is not None else None

    @property
    def shade(self) -> int:
        """-4 (the teacher finds it far worse) to 4 (far better); 0 for what both agree on, or before scoring."""
        gap = self.gap or 0.0
        depth = sum(abs(gap) >= step for step in STEPS)
        return depth if gap > 0 else -depth


@dataclass(frozen=True)
class Sample:
    """One row to show."""

    uid: str
    finish_reason: str
    meta: str
    prompt: str
    completion: str
    """As it was stored; empty where the dataset keeps ids alone."""
    graded: tuple[Graded, ...]
    spelled: bool
    """Whether the texts of `graded` were decoded; else they are the ids."""

    @property
    def gap(self) -> float | None:
        """Mean of teacher minus rollout over the tokens, in nats."""
        if any(piece.gap is None for piece in self.graded):
            return None
        return sum(piece.gap or 0.0 for piece in self.graded) / sum(len(piece.ids) for piece in self.graded)

    @property
    def tokens(self) -> int:
        """Tokens of the completion."""
        return sum(len(piece.ids) for piece in self.graded)


def sample_of(row: Rollout, tokenizer: "PreTrainedTokenizerBase | None") -> Sample:
    """The row to show; in text if the tokenizer is at hand and spells the row as it was stored."""
    ids = row.completion_ids.tolist()
    if tokenizer is not None and row.completion and tokenizer.decode(ids) != row.completion:
        tokenizer = None  # it is another model's: what it makes of the ids would be an invention
    if tokenizer is None:
        spelled = [Piece(f"{number} ", index, index + 1) for index, number in enumerate(ids)]
        prompt = row.prompt or " ".join(map(str, row.prompt_ids.tolist()))
    else:
        spelled = pieces(tokenizer, ids)
        prompt = "".join(piece.text for piece in pieces(tokenizer, row.prompt_ids.tolist()))
    return Sample(
        uid=row.uid,
        finish_reason=row.finish_reason,
        meta=row.meta,
        prompt=prompt,
        completion=row.completion,
        graded=tuple(_grade(piece, ids, row) for piece in spelled),
        spelled=tokenizer is not None,
    )


def worst(sample: Sample, count: int) -> list[tuple[int, Graded]]:
    """The pieces the teacher finds worst against the rollout, each with its place among the pieces."""
    graded = [(index, piece) for index, piece in enumerate(sample.graded) if piece.shade < 0]
    return sorted(graded, key=lambda entry: entry[1].gap or 0.0)[:count]


def as_json(sample: Sample) -> dict[str, Any]:
    """The row with one entry a piece."""
    return {
        "uid": sample.uid,
        "finish_reason": sample.finish_reason,
        "meta": sample.meta,
        "prompt": sample.prompt,
        "completion": sample.completion,
        "gap": sample.gap,
        "pieces": [
            {"text": piece.text if sample.spelled else None, "ids": list(piece.ids)}
            | {"rollout_logprob": piece.rollout, "teacher_logprob": piece.teacher}
            for piece in sample.graded
        ],
    }


def spread(rows: int, count: int) -> list[int]:
    """Indices of `count` rows spread evenly over a dataset."""
    count = min(rows, count)
    return [int((index + 0.5) * rows / count) for index in range(count)]


def _grade(piece: Piece, ids: Sequence[int], row: Rollout) -> Graded:
    own = slice(piece.start, piece.stop)
    teacher = _sum(row.teacher_logprobs[own]) if row.teacher_logprobs is not None else None
    return Graded(piece.text, tuple(ids[own]), _sum(row.rollout_logprobs[own]), teacher)


def _sum(logprobs: np.ndarray) -> float:
    return float(logprobs.sum(dtype=np.float64))
