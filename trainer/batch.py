"""Rows packed into one micro-batch: one long sequence whose position ids restart at every row.

The restart is the whole mask: the model tells rows apart by it, as long as it gets no attention mask and no cache
(`model.py`). Padding does not exist.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from common.schema import Rollout


@dataclass(frozen=True)
class Batch:
    """One micro-batch; the per-token tensors cover completion tokens only, row after row."""

    uids: tuple[str, ...]
    input_ids: Tensor  # (1, length) int64, prompts and completions
    position_ids: Tensor  # (1, length) int64, from 0 in every row
    predictors: Tensor  # (tokens,) int64: the position whose logits predict the token, one before the token's own
    row: Tensor  # (tokens,) int64: which of `uids` the token belongs to
    position: Tensor  # (tokens,) int64: the token's place in its completion, from 0
    length: Tensor  # (tokens,) int64: tokens of its completion
    ids: Tensor  # (tokens,) int64: the sampled tokens
    rollout: Tensor  # (tokens,) float32 nats
    teacher: Tensor  # (tokens,) float32 nats; NaN where the dataset is not scored, so that use of it cannot pass
    topk_ids: Tensor  # (tokens, k) int64; k = 0 where the dataset has none
    topk_teacher: Tensor  # (tokens, k) float32 nats

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self) if f.name != "uids"}
        return replace(self, **moved)

    def per_row(self, values: Tensor) -> list[np.ndarray]:
        """Split a (tokens,) tensor into one array per row."""
        counts = torch.bincount(self.row, minlength=len(self.uids)).tolist()
        return [piece.numpy() for piece in values.detach().float().cpu().split(counts)]


def pack(rows: Sequence[Rollout], *, topk: int = 0) -> Batch:
    """Pack rows into one sequence; no rows make the empty batch: one idle token, nothing to predict.

    The empty batch is what a rank runs when it has no bin left in a step: it takes part in every collective and its
    loss is an exact zero.
    """
    lengths = [(len(row.prompt_ids), len(row.completion_ids)) for row in rows]
    starts = np.cumsum([0] + [prompt + completion for prompt, completion in lengths])
    predictors = [s + p - 1 + np.arange(c) for s, (p, c) in zip(starts, lengths, strict=False)]
    return Batch(
        uids=tuple(row.uid for row in rows),
        input_ids=_ints([part for row in rows for part in (row.prompt_ids, row.completion_ids)] or [[0]])[None],
        position_ids=_ints([np.arange(p + c) for p, c in lengths] or [[0]])[None],
        predictors=_ints(predictors),
        row=_ints([np.full(c, index) for index, (_, c) in enumerate(lengths)]),
        position=_ints([np.arange(c) for _, c in lengths]),
        length=_ints([np.full(c, c) for _, c in lengths]),
        ids=_ints([row.completion_ids for row in rows]),
        rollout=_floats([row.rollout_logprobs for row in rows]),
        teacher=_floats([_or_nan(row.teacher_logprobs, row) for row in rows]),
        topk_ids=_ints([_columns(row.topk_ids, row, topk) for row in rows] or [np.empty((0, topk))]),
        topk_teacher=_floats([_columns(row.topk_logprobs, row, topk) for row in rows] or [np.empty((0, topk))]),
    )


def _ints(parts: Sequence) -> Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(part, np.int64) for part in parts] or [np.empty(0, np.int64)]))


def _floats(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(list(parts) or [np.empty(0)]).astype(np.float32))


def _or_nan(logprobs: np.ndarray | None, row: Rollout) -> np.ndarray:
    return np.full(len(row.completion_ids), np.nan, np.float32) if logprobs is None else logprobs


def _columns(values: np.ndarray | None, row: Rollout, topk: int) -> np.ndarray:
    """The first `topk` columns of a per-token matrix, (tokens, topk); none are asked of a dataset without them."""
    if topk == 0 or values is None:
        return np.empty((len(row.completion_ids), 0))
    return values[:, :topk]
