"""One optimizer step: the global count first, then forward and backward of every micro-batch, then the update."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from trainer.batch import Batch
from trainer.fused_head import HeadLoss
from trainer.logprobs import Scores
from trainer.metrics import merged, token_sums, vector
from trainer.objectives import Tokens
from trainer.postmortem import NotFinite, Seen
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
    return _forward(model, batch, temperature=temperature, chunk=chunk)


def train_step(
    model: PreTrainedModel, optimizer: Optimizer, batches: Sequence[Batch], rules: Rules, world: World
) -> tuple[Tensor, float]:
    """Update the model once; returns this rank's numbers (`metrics.py`) and the norm of the gradient before clipping.

    Raises:
        NotFinite: a loss or the gradient is not finite; the weights are as they were before the step.
    """
    weights = [mean_weights(batch, rules.mean) for batch in batches]
    total = world.sum(torch.stack([weight.double().sum() for weight in weights]).sum())
    optimizer.zero_grad(set_to_none=True)
    sums, seen = vector(world.device), []
    for batch, weight in zip(batches, weights, strict=True):
        result = loss_of(model, batch, weight, rules)
        # FSDP averages the gradients over ranks; times the number of ranks makes that the sum we want.
        (result.total * (world.size / total).float()).backward()
        seen.append(Seen(batch, result.scores.chosen.detach(), result.losses.detach()))
        tokens = tokens_of(batch, slice(None), result.scores)
        sums = merged(sums, _sums(tokens, result.losses, weight, rules))
    _refuse_bad_rows(seen, world)
    norm = _clipped_norm(model, rules.clip, seen, world)
    optimizer.step()
    return sums, norm


def mean_weights(batch: Batch, mean: str) -> Tensor:
    """Weight of every token before division by the global sum of weights, (tokens,) float32.

    `token` gives every token the same; `rollout` gives every rollout the same, shared among its tokens.
    """
    if mean == "token":
        return torch.ones_like(batch.rollout)
    return 1.0 / batch.length.float()


def loss_of(model: PreTrainedModel, batch: Batch, weight: Tensor, rules: Rules) -> HeadLoss:
    """The weighted loss of a micro-batch, in one forward pass."""
    return _forward(
        model,
        batch,
        loss=lambda rows, scores: rules.loss(tokens_of(batch, rows, scores)) * weight[rows],
        chunk=rules.logits_chunk,
    )


def _forward(model: PreTrainedModel, batch: Batch, **how: Any) -> Any:
    """The model on the completion tokens of the batch; `how` says whether for scores or for a loss (`model.py`)."""
    return model(
        batch.input_ids,
        batch.position_ids,
        predictors=batch.predictors,
        targets=batch.ids,
        topk_ids=batch.topk_ids,
        **how,
    )


def tokens_of(batch: Batch, rows: slice, scores: Scores) -> Tokens:
    """What student, teacher and rollout policy say about the completion tokens `rows` of the batch."""
    return Tokens(
        student=scores.chosen,
        teacher=batch.teacher[rows],
        rollout=batch.rollout[rows],
        ids=batch.ids[rows],
        entropy=scores.entropy,
        position=batch.position[rows],
        length=batch.length[rows],
        topk_ids=batch.topk_ids[rows],
        topk_teacher=batch.topk_teacher[rows],
        topk_student=scores.topk,
    )


def _sums(tokens: Tokens, losses: Tensor, weight: Tensor, rules: Rules) -> Tensor:
    return token_sums(
        student=tokens.student,
        teacher=tokens.teacher,
        rollout=tokens.rollout,
        entropy=tokens.entropy,
        loss=losses,
        weight=weight,
        position=tokens.position,
        length=tokens.length,
        max_importance_ratio=rules.max_importance_ratio,
    )


def _refuse_bad_rows(seen: Sequence[Seen], world: World) -> None:
    """Every rank learns of every rank's bad rows, so that all stop together."""
    mine = [batch.uids[row] for batch, _, losses in seen for row in batch.row[~losses.isfinite()].unique().tolist()]
    rows = [uid for uids in world.gather(mine) for uid in uids]
    if rows:
        what = f"the loss of {len(rows)} rows is not finite; the model was not updated"
        raise _not_finite(what, f"rows {', '.join(rows[:NAMED])}", rows, seen)


def _clipped_norm(model: PreTrainedModel, clip: float, seen: Sequence[Seen], world: World) -> float:
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    value = norm.full_tensor().item()  # pyright: ignore[reportAttributeAccessIssue] - a DTensor under FSDP2
    if not math.isfinite(value):
        mine = [uid for batch, _, _ in seen for uid in batch.uids]
        rows = [uid for uids in world.gather(mine) for uid in uids]
        what = f"the gradient is not finite ({value}); the model was not updated"
        raise _not_finite(what, f"one of {len(rows)} rows: {', '.join(rows[:NAMED])}", (), seen)
    return value


def _not_finite(what: str, where: str, uids: Sequence[str], seen: Sequence[Seen]) -> NotFinite:
    error = NotFinite(
        what,
        where=where,
        fix="Look at these rows; if they are sound, train anew into another output with a lower lr or clip, "
        "or with compute=float32",
    )
    error.uids, error.seen = uids, seen
    return error
