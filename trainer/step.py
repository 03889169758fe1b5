"""One optimizer step: the global count first, then forward and backward of every micro-batch, then the update."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from common.errors import DataError
from trainer.batch import Batch
from trainer.logprobs import Scores
from trainer.metrics import token_sums, with_peak
from trainer.objectives import Tokens, importance_ratio
from trainer.world import World

NAMED = 5
"""How many rows an error names."""


@dataclass(frozen=True)
class Rules:
    """How a step treats its tokens."""

    loss: Callable[[Tokens], Tensor]  # (tokens,) from the tokens of a micro-batch
    mean: str  # "token" or "rollout"
    max_importance_ratio: float
    clip: float
    logits_chunk: int


def score(model: PreTrainedModel, batch: Batch, *, temperature: float, chunk: int) -> Scores:
    """The model's scores of the batch's completion tokens."""
    return model(
        batch.input_ids,
        batch.position_ids,
        predictors=batch.predictors,
        targets=batch.ids,
        topk_ids=batch.topk_ids,
        temperature=temperature,
        chunk=chunk,
    )


def train_step(
    model: PreTrainedModel, optimizer: Optimizer, batches: Sequence[Batch], rules: Rules, world: World
) -> tuple[Tensor, float]:
    """Update the model once; returns the metric sums of this rank and the norm of the gradient before clipping.

    Raises:
        DataError: a loss or the gradient is not finite; the weights are as they were before the step.
    """
    weights = [token_weights(batch, rules.mean) for batch in batches]
    total = world.sum(torch.stack([weight.double().sum() for weight in weights]).sum())
    optimizer.zero_grad(set_to_none=True)
    sums, peak, bad = torch.zeros((), dtype=torch.float64), 0.0, []
    for batch, weight in zip(batches, weights, strict=True):
        tokens, scores = _tokens(model, batch, rules)
        losses = rules.loss(tokens)
        bad += _not_finite(losses, batch)
        # FSDP averages the gradients over ranks; times the number of ranks makes that the sum we want.
        loss = (losses * weight).sum() * (world.size / total).float()
        loss.backward()
        sums = sums + _sums(tokens, scores.entropy, losses, weight, rules)
        peak = max(peak, importance_ratio(tokens).max().item() if len(tokens.ids) else 0.0)
    _refuse_bad_rows(bad, world)
    norm = _clipped_norm(model, rules.clip, batches, world)
    optimizer.step()
    return with_peak(sums, peak, world.rank, world.size), norm


def token_weights(batch: Batch, mean: str) -> Tensor:
    """Weight of every token before division by the global sum of weights, (tokens,) float32.

    `token` gives every token the same; `rollout` gives every rollout the same, shared among its tokens.
    """
    if mean == "token":
        return torch.ones_like(batch.rollout)
    lengths = torch.bincount(batch.row, minlength=len(batch.uids))
    return 1.0 / lengths[batch.row].float()


def _tokens(model: PreTrainedModel, batch: Batch, rules: Rules) -> tuple[Tokens, Scores]:
    scores = score(model, batch, temperature=1.0, chunk=rules.logits_chunk)
    return (
        Tokens(
            student=scores.chosen,
            teacher=batch.teacher,
            rollout=batch.rollout,
            ids=batch.ids,
            topk_ids=batch.topk_ids,
            topk_teacher=batch.topk_teacher,
            topk_student=scores.topk,
        ),
        scores,
    )


def _sums(tokens: Tokens, entropy: Tensor, losses: Tensor, weight: Tensor, rules: Rules) -> Tensor:
    return token_sums(
        student=tokens.student,
        teacher=tokens.teacher,
        rollout=tokens.rollout,
        entropy=entropy,
        loss=losses,
        weight=weight,
        max_importance_ratio=rules.max_importance_ratio,
    ).cpu()


def _not_finite(losses: Tensor, batch: Batch) -> list[str]:
    bad = batch.row[~losses.detach().isfinite()].unique().tolist()
    return [batch.uids[row] for row in bad]


def _refuse_bad_rows(bad: list[str], world: World) -> None:
    """Every rank learns of every rank's bad rows, so that all stop together."""
    rows = [uid for uids in world.gather(bad) for uid in uids]
    if rows:
        raise DataError(
            f"the loss of {len(rows)} rows is not finite; the model was not updated",
            where=f"rows {', '.join(rows[:NAMED])}",
            fix="Look at these rows; if they are sound, lower lr and resume from the last checkpoint",
        )


def _clipped_norm(model: PreTrainedModel, clip: float, batches: Sequence[Batch], world: World) -> float:
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    value = norm.full_tensor().item()  # pyright: ignore[reportAttributeAccessIssue] - a DTensor under FSDP2
    if not math.isfinite(value):
        rows = [uid for uids in world.gather([uid for batch in batches for uid in batch.uids]) for uid in uids]
        raise DataError(
            f"the gradient is not finite ({value}); the model was not updated",
            where=f"one of {len(rows)} rows: {', '.join(rows[:NAMED])}",
            fix="Lower lr or clip, or use compute=float32, and resume from the last checkpoint",
        )
    return value
