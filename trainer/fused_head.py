"""The loss of a batch together with the head below it: logits are computed once, a chunk at a time, and never kept.

A loss reads a few log-probs of each token, so its gradient with respect to the logits is known in closed form as soon
as its derivative with respect to those few is. That derivative is taken right there, chunk by chunk, in the forward
pass, and carried on to the hidden states and the head; the backward pass only hands it out. Against recomputing the
logits in the backward pass this saves one product of the head in four, and the loss may be any function of a token's
scores.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.logprobs import Buffers, Scores, as_factor, multiply, products_of, read_scores

Loss = Callable[[slice, Scores], Tensor]
"""What each token in a slice of the batch adds to the loss, (rows,), from what the student says about them."""


class HeadLoss(NamedTuple):
    """The loss of a batch and what it was made of."""

    total: Tensor  # () differentiable
    losses: Tensor  # (tokens,) whose sum it is
    scores: Scores


def head_loss(
    hidden: Tensor,  # (tokens, width) of the positions that predict the targets
    head: Tensor,  # (vocab, width)
    targets: Tensor,  # (tokens,) int64
    topk_ids: Tensor,  # (tokens, k) int64
    loss: Loss,
    *,
    chunk: int = 1024,
) -> HeadLoss:
    """The sum of the tokens' losses, differentiable in `hidden` and `head`; the rest comes back without gradient.

    `loss` must treat tokens one by one: it sees them in chunks. Memory is O(chunk x vocab) beside a float32 gradient of
    the head. In bfloat16 log-probs and losses are those of exact products, and the gradient's last product rounds its
    factors to bfloat16, as every gradient of the body does; in float32 nothing is rounded.
    """
    total, losses, *scores = _HeadLoss.apply(hidden, head, targets, topk_ids, loss, chunk)  # type: ignore[misc]
    return HeadLoss(total, losses, Scores(*scores))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        hidden, head, targets, topk_ids, loss, chunk = inputs
        wanted = ctx.needs_input_grad[:2]
        grads = [_float32_zeros(x) if needed else None for x, needed in zip((hidden, head), wanted, strict=True)]
        buffers, factor = Buffers(hidden, head, chunk), as_factor(head)
        losses, pieces = [], []
        with products_of(head.dtype):
            for start in range(0, max(len(hidden), 1), chunk):
                rows = slice(start, start + chunk)
                logps = buffers.log_softmax(hidden[rows], factor)
                probs = buffers.probs(logps)
                scores = read_scores(logps, probs, targets[rows], topk_ids[rows])
                pieces.append(scores)
                values, by_chosen, by_topk = _derivatives(scores, loss, rows)
                losses.append(values)
                if any(wanted):
                    by_logits = _by_logits(probs, targets[rows], topk_ids[rows], by_chosen, by_topk)
                    _accumulate(grads, rows, by_logits, hidden[rows], factor)
        ctx.save_for_backward(*grads)
        ctx.dtypes = (hidden.dtype, head.dtype)
        values, scores = torch.cat(losses), Scores(*(torch.cat(columns) for columns in zip(*pieces, strict=True)))
        ctx.mark_non_differentiable(values, *scores)
        return values.sum(), values, *scores

    @staticmethod
    def backward(ctx: Any, *by_outputs: Any) -> tuple[Any, ...]:
        scale = by_outputs[0]
        grads = [
            None if grad is None else grad.mul_(scale).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None)


def _float32_zeros(like: Tensor) -> Tensor:
    """Where a gradient adds up over the chunks: in float32, whatever the type of its tensor."""
    return torch.zeros_like(like, dtype=torch.float32)


def _derivatives(scores: Scores, loss: Loss, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """The losses, (rows,), and the derivatives of their sum by `chosen`, (rows,), and by `topk`, (rows, k)."""
    with torch.enable_grad():
        asked = scores._replace(chosen=scores.chosen.requires_grad_(), topk=scores.topk.requires_grad_())
        losses = loss(rows, asked)
        by_chosen, by_topk = torch.autograd.grad(losses.sum(), (asked.chosen, asked.topk), materialize_grads=True)
    for column in (asked.chosen, asked.topk):
        column.requires_grad_(False)
    return losses.detach(), by_chosen, by_topk


def _by_logits(probs: Tensor, targets: Tensor, topk_ids: Tensor, by_chosen: Tensor, by_topk: Tensor) -> Tensor:
    """The derivative by the logits, (rows, vocab), in place of `probs`.

    d log p_i / d logit_j = [i = j] - p_j, so each asked log-prob adds its derivative at its own id and takes p times it
    away everywhere.
    """
    probs.mul_(-(by_chosen + by_topk.sum(-1))[:, None])
    probs.scatter_add_(-1, targets[:, None], by_chosen[:, None])
    return probs.scatter_add_(-1, topk_ids, by_topk)


def _accumulate(grads: list[Tensor | None], rows: slice, by_logits: Tensor, hidden: Tensor, head: Tensor) -> None:
    by_hidden, by_head = grads
    left = by_logits.to(head.dtype)
    if by_hidden is not None:
        multiply(left, head, out=by_hidden[rows])
    if by_head is not None:
        multiply(left.T, as_factor(hidden), out=by_head, add=True)
