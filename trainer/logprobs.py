"""Log-probabilities from hidden states, never holding more than a chunk of float32 logits.

Why float32 and why a chunk: bfloat16 logits alone cost 0.02 nats a token, as much as the signal we train on, and
float32 logits of a whole batch (16k tokens x 152k ids) would be 10 GB. So the head is applied to one chunk of rows at a
time, its sums in float32. Factors that are bfloat16 already lose nothing in a bfloat16 product with float32 sums, which
is several times faster than a float32 one: `multiply` uses it wherever the machine has it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Scores(NamedTuple):
    """What the student says about the tokens of a batch; all float32 nats. FSDP looks for tensors in tuples."""

    chosen: Tensor  # (tokens,) log-prob of the target
    entropy: Tensor  # (tokens,) of the whole next-token distribution
    topk: Tensor  # (tokens, k) log-probs at the asked ids; k may be 0


@torch.no_grad()
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

    No gradient; for that see `head_loss`, which computes the very same numbers.
    """
    buffers, factor = Buffers(hidden, head, chunk), as_factor(head)
    pieces = []
    with products_of(head.dtype):
        for start in range(0, max(len(hidden), 1), chunk):
            rows = slice(start, start + chunk)
            logps = buffers.log_softmax(hidden[rows], factor, temperature)
            pieces.append(read_scores(logps, buffers.probs(logps), targets[rows], topk_ids[rows]))
    return Scores(*(torch.cat(columns) for columns in zip(*pieces, strict=True)))


def logprob_rows(hidden: Tensor, head: Tensor, *, vocab: int, chunk: int = 256) -> Iterator[Tensor]:
    """Yield the full float32 log-softmax rows over the first `vocab` ids, (<= chunk, vocab) at a time; no gradient."""
    head = head[:vocab].float()
    for piece in hidden.split(chunk):
        yield F.linear(piece.float(), head).log_softmax(-1)


class Buffers:
    """Two (chunk, vocab) float32 matrices, made once and filled anew for every chunk.

    Fresh ones for every chunk would cost more than the products on a CPU, where each is mapped page by page.
    """

    def __init__(self, hidden: Tensor, head: Tensor, chunk: int) -> None:
        shape = (min(chunk, len(hidden)), len(head))
        self._logits, self._logps = (hidden.new_empty(shape, dtype=torch.float32) for _ in range(2))

    def log_softmax(self, hidden: Tensor, head: Tensor, temperature: float = 1.0) -> Tensor:
        """log softmax(hidden @ head.T / temperature), (rows, vocab) float32."""
        logits, logps = self._logits[: len(hidden)], self._logps[: len(hidden)]
        multiply(as_factor(hidden), head.T, out=logits)
        if temperature != 1.0:
            logits /= temperature
        return torch.log_softmax(logits, -1, out=logps)

    def probs(self, logps: Tensor) -> Tensor:
        """exp(logps), in place of the logits they came from."""
        return torch.exp(logps, out=self._logits[: len(logps)])


def read_scores(logps: Tensor, probs: Tensor, targets: Tensor, topk_ids: Tensor) -> Scores:
    """The scores in a chunk of log-probs, (rows, vocab); overwrites `logps`, which nobody needs any more."""
    chosen, topk = logps.gather(-1, targets[:, None])[:, 0], logps.gather(-1, topk_ids)
    return Scores(chosen, -logps.mul_(probs).sum(-1), topk)


def as_factor(matrix: Tensor) -> Tensor:
    """The matrix in the type in which `multiply` takes it: itself where bfloat16 has a kernel with float32 sums."""
    return matrix if matrix.is_cuda and matrix.dtype == torch.bfloat16 else matrix.float()


def multiply(left: Tensor, right: Tensor, *, out: Tensor, add: bool = False) -> Tensor:
    """out = left @ right, or out += left @ right; sums and `out` are float32. Factors come from `as_factor`."""
    if left.dtype == torch.bfloat16:
        if add:
            return torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return out.addmm_(left, right) if add else torch.mm(left, right, out=out)


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Within it float32 products on a CPU may round their factors to `dtype`; bfloat16 ones are exact, and faster.

    oneDNN does so on CPUs with bfloat16 units and ignores it on others. Elsewhere products are exact float32.
    """
    backend: Any = torch.backends.mkldnn  # its attributes are made at run time
    matmul = backend.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if dtype == torch.bfloat16 else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
