"""Log-probabilities of chosen tokens from hidden states, never holding more than a chunk of float32 logits.

Why float32 and why a chunk: bfloat16 logits alone cost 0.02 nats a token, as much as the signal we train on, and
float32 logits of a whole batch (16k tokens x 152k ids) would be 10 GB. So the head is applied in float32 to one
chunk at a time and recomputed in the backward pass.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Scores(NamedTuple):
    """What the student says about the tokens of a batch; all float32 nats. FSDP looks for tensors in tuples."""

    chosen: Tensor  # (tokens,) log-prob of the target, differentiable
    entropy: Tensor  # (tokens,) of the whole next-token distribution, no gradient
    topk: Tensor  # (tokens, k) log-probs at the asked ids, differentiable; k may be 0


def score_tokens(
    hidden: Tensor,  # (tokens, width) of the positions that predict the targets
    head: Tensor,  # (vocab, width)
    targets: Tensor,  # (tokens,) int64
    topk_ids: Tensor,  # (tokens, k) int64
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> Scores:
    """Log-probs of `targets` and of `topk_ids` under softmax(hidden @ head.T / temperature), and its entropy.

    The head is raised to float32 once, so its gradient also accumulates over the chunks in float32. Gradients are
    exact; memory is O(chunk x vocab) forward and backward, at the price of computing the logits twice.
    """
    head = head.float()
    pieces = [
        checkpoint(_score_chunk, h, head, t, k, temperature, use_reentrant=False)
        for h, t, k in zip(hidden.split(chunk), targets.split(chunk), topk_ids.split(chunk), strict=True)
    ]
    return Scores(*(torch.cat(columns) for columns in zip(*pieces, strict=True)))


def _score_chunk(hidden: Tensor, head: Tensor, targets: Tensor, topk_ids: Tensor, temperature: float) -> Scores:
    logits = F.linear(hidden.float(), head) / temperature  # (chunk, vocab)
    log_norm = logits.logsumexp(-1, keepdim=True)
    chosen = (logits.gather(-1, targets[:, None]) - log_norm)[:, 0]
    topk = logits.gather(-1, topk_ids) - log_norm
    # Last on purpose: the recomputation in backward stops at the last tensor it needs, which leaves the entropy out.
    with torch.no_grad():
        entropy = log_norm[:, 0] - ((logits - log_norm).exp() * logits).sum(-1)
    return Scores(chosen, entropy, topk)


def logprob_rows(hidden: Tensor, head: Tensor, *, vocab: int, chunk: int = 256) -> Iterator[Tensor]:
    """Yield the full float32 log-softmax rows over the first `vocab` ids, (<= chunk, vocab) at a time; no gradient."""
    head = head[:vocab].float()
    for piece in hidden.split(chunk):
        yield F.linear(piece.float(), head).log_softmax(-1)
