"""The log-prob of a chosen token and its gradient, by every head there is: time, memory and error, each in a process of
its own.

All get the same hidden states, head and upstream gradient in the compute type, and are compared with a float64 product
of just these: what differs is what the head itself loses.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cost import in_fresh_process
from benchmarks.trainer.probes import CLOCKS, now, peak_bytes, reset_peak
from trainer.fused_head import head_loss

Row = dict[str, Any]
Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden (tokens, width), head (vocab, width), targets (tokens,) -> log-probs (tokens,), differentiable."""
REPEATS = 2
COMPARED = 64
"""Tokens whose float64 reference is computed; the errors are of these."""


@dataclass(frozen=True)
class Shape:
    """Of one measurement."""

    tokens: int
    width: int
    vocab: int
    compute: str = "bfloat16"
    device: str = "cpu"
    threads: int = 0
    clock: str = "wall"


def full_logits(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """What everybody writes first: all logits in the compute type, their log-softmax in float32."""
    return F.linear(hidden, head).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def checkpointed_chunks(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Float32 logits of a chunk at a time, computed again in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    whole = head.float()
    pieces = [
        checkpoint(full_logits, h.float(), whole, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(pieces)  # pyright: ignore[reportArgumentType, reportCallIssue]


def torchs(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """torch.nn.functional.linear_cross_entropy of torch 2.13, token by token."""
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()  # without them all logits are made at once
    return -F.linear_cross_entropy(hidden, head, targets, reduction="none", options=options)


def ligers(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Liger's fused linear cross entropy, its gradients summed in float32; 0.8.5, before which these were wrong."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss as Loss  # pyright: ignore[reportMissingImports]

    return -Loss(reduction="none", accum_dtype=torch.float32)(head, hidden, targets)


def apples(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Apple's Cut Cross-Entropy."""
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return -linear_cross_entropy(hidden, head, targets, reduction="none")


HEADS: dict[str, Head | None] = {
    "full logits": full_logits,
    "chunks, checkpointed": checkpointed_chunks,
    "ours, fused": None,
    "torch's linear_cross_entropy": torchs,
    "Liger": ligers,
    "Apple's Cut Cross-Entropy": apples,
}
"""None: ours takes the gradient along with the loss, so it is called another way."""
TRITON = {"Liger": "liger_kernel", "Apple's Cut Cross-Entropy": "cut_cross_entropy"}
"""Those written in Triton, which compiles for CUDA alone, and their packages."""


def measure_heads(shape: Shape) -> Iterator[Row]:
    """A row a head; what does not run here says why."""
    for name in HEADS:
        row: Row = {"table": "heads", "head": name, "tokens": shape.tokens, "width": shape.width, "vocab": shape.vocab}
        reason = absent(name, shape.device)
        yield {**row, "absent": reason} if reason else {**row, **measure_one(name, shape)}


def measure_one(name: str, shape: Shape) -> Row:
    """Seconds, peak above the inputs, and errors of one head."""
    return in_fresh_process(_measure, name, shape)


def absent(name: str, device: str) -> str:
    """Why a head does not run here; empty where it does."""
    from importlib.util import find_spec

    if name not in TRITON:
        return ""
    if device != "cuda":
        return "needs CUDA"
    return "" if find_spec(TRITON[name]) else f"needs {TRITON[name]}"


def _measure(name: str, shape: Shape) -> Row:
    """In this process: the best of a few passes, the peak above the inputs, and the errors."""
    if shape.threads:
        torch.set_num_threads(shape.threads)
    hidden, head, targets, upstream = _inputs(shape)
    once, clock = _pass(name), CLOCKS[shape.clock]
    once(hidden, head, targets, upstream)
    hidden.grad = head.grad = None
    seconds, peak = [], 0
    for _ in range(REPEATS):
        reset_peak()
        held, began = peak_bytes(), now(clock)
        logprobs = once(hidden, head, targets, upstream)
        seconds.append(now(clock) - began)
        peak = max(peak, peak_bytes() - held)
        grads = (hidden.grad, head.grad)
        hidden.grad = head.grad = None
    return {"seconds": min(seconds), "peak_bytes": peak, **_errors(shape, logprobs, *grads)}


def _inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    dtype = getattr(torch, shape.compute)
    hidden = torch.randn(shape.tokens, shape.width, generator=draw)
    head = torch.randn(shape.vocab, shape.width, generator=draw) * (3.0 / shape.width**0.5)  # logits of a real spread
    targets = torch.randint(shape.vocab, (shape.tokens,), generator=draw)
    upstream = torch.zeros(shape.tokens)
    upstream[: min(COMPARED, shape.tokens)] = torch.randn(min(COMPARED, shape.tokens), generator=draw)
    put = [hidden.to(dtype), head.to(dtype), targets, upstream]
    first, second, third, fourth = (x.to(shape.device) for x in put)
    return first.requires_grad_(), second.requires_grad_(), third, fourth


def _pass(name: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Forward and backward of sum(upstream x log-prob); the gradients are left in `.grad`."""
    head_function = HEADS[name]
    if head_function is None:
        return _ours

    def once(hidden: Tensor, head: Tensor, targets: Tensor, upstream: Tensor) -> Tensor:
        logprobs = head_function(hidden, head, targets)
        (logprobs * upstream).sum().backward()
        return logprobs.detach()

    return once


def _ours(hidden: Tensor, head: Tensor, targets: Tensor, upstream: Tensor) -> Tensor:
    none = targets.new_zeros(len(targets), 0)
    result = head_loss(hidden, head, targets, none, loss=lambda rows, scores: upstream[rows] * scores.chosen)
    result.total.backward()
    return result.scores.chosen


def _errors(shape: Shape, logprobs: Tensor, hidden_grad: Tensor | None, head_grad: Tensor | None) -> Row:
    """Largest error of a log-prob, and the errors of both gradients relative to their norms, against float64.

    Only the first tokens have an upstream gradient, so the reference needs no more of them than these.
    """
    some = min(COMPARED, shape.tokens)
    hidden, head, targets, upstream = (x.detach() for x in _inputs(shape))
    exact_hidden = hidden[:some].double().requires_grad_()
    exact_head = head.double().requires_grad_()
    logits = F.linear(exact_hidden, exact_head)
    exact = (logits.gather(-1, targets[:some, None]) - logits.logsumexp(-1, keepdim=True))[:, 0]
    (exact * upstream[:some]).sum().backward()
    return {
        "logprob_error": (logprobs[:some].double() - exact).abs().max().item(),
        "hidden_grad_error": _relative(hidden_grad, exact_hidden.grad),
        "head_grad_error": _relative(head_grad, exact_head.grad),
    }


def _relative(found: Tensor | None, exact: Tensor | None) -> float:
    assert found is not None
    assert exact is not None
    return ((found[: len(exact)].double() - exact).norm() / exact.norm()).item()
