"""The numbers of a step as sums and peaks, so that ranks add up exactly: a mean of means is nobody's mean.

A rank's numbers are one float64 vector, its sums first and then its largest values. All ranks' vectors become one in a
single all-reduce (`spread`, then `world.py`), and only then are there ratios. docs/training.md explains each figure.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

QUARTERS = 4
"""Parts of a completion in which the distance to the teacher is told."""
SUMS = (
    "tokens", "weight", "loss", "advantage", "advantage_sq", "teacher_k3", "drift", "rollout_k3", "ratio", "ratio_sq",
    "clipped", "entropy", "tokens_q1", "tokens_q2", "tokens_q3", "tokens_q4", "gap_q1", "gap_q2", "gap_q3", "gap_q4",
    "processed", "bins", "flops",
)  # fmt: skip
"""Order of the summed numbers in the vector; the last three are of the work done and not of single tokens."""
PEAKS = ("ratio", "advantage", "disadvantage", "wait", "memory")
"""Order of the largest values that follow the sums; `disadvantage` is minus the advantage."""


def token_sums(
    *,
    student: Tensor,
    teacher: Tensor,
    rollout: Tensor,
    entropy: Tensor,
    loss: Tensor,
    weight: Tensor,
    position: Tensor,
    length: Tensor,
    max_importance_ratio: float,
) -> Tensor:
    """The vector of one micro-batch; NaN columns of an unscored dataset stay NaN.

    Only the loss is weighted: it is then the mean that was trained, while all else is told per token.

    Args:
        student, teacher, rollout, entropy: (tokens,) float32 nats.
        loss, weight: (tokens,) float32, the loss times its weight, and the weight.
        position, length: (tokens,) int64, the token's index in its completion and that completion's tokens.
    """
    student = student.detach()
    advantage, drift = teacher - student, student - rollout
    ratio = drift.exp()
    columns = (
        torch.ones_like(student),
        weight,
        loss.detach(),
        advantage,
        advantage.square(),
        _k3(advantage),
        drift,
        _k3(drift),
        ratio,
        ratio.square(),
        (ratio > max_importance_ratio).float(),
        entropy,
        *_quarters(-advantage, position, length),
    )
    return _summed(columns, (ratio, advantage, -advantage))


def _quarters(gap: Tensor, position: Tensor, length: Tensor) -> list[Tensor]:
    """Per quarter of the completions, which tokens lie in it; then per quarter, the gap of those."""
    quarter = QUARTERS * position // length
    inside = [quarter == number for number in range(QUARTERS)]
    return [*(here.float() for here in inside), *(torch.where(here, gap, 0.0) for here in inside)]


def _summed(columns: Sequence[Tensor], peaked: Sequence[Tensor]) -> Tensor:
    """The vector that begins with the columns' sums, and whose peaks begin with the largest values of `peaked`."""
    sums = torch.stack([column.double().sum() for column in columns])
    peaks = torch.stack([_largest(column.double()) for column in peaked])
    known = vector(sums.device)
    known[: len(sums)] = sums
    known[len(SUMS) : len(SUMS) + len(peaks)] = peaks
    return known


def vector(
    device: torch.device | None = None, *, wait: float = -math.inf, memory: float = -math.inf, **work: float
) -> Tensor:
    """A vector that holds only these numbers: `processed`, `bins` and `flops` of `SUMS`, and two peaks.

    Args:
        wait: seconds this rank waited for its batches.
        memory: bytes this rank held at most.
    """
    values = torch.zeros(len(SUMS) + len(PEAKS), dtype=torch.float64)
    values[len(SUMS) :] = -math.inf
    values[-2], values[-1] = wait, memory
    for name, value in work.items():
        values[SUMS.index(name)] = value
    return values.to(device) if device is not None else values


def merged(one: Tensor, other: Tensor) -> Tensor:
    """Two vectors as one: the sums added, of the peaks the larger."""
    split = len(SUMS)
    return torch.cat([one[:split] + other[:split], torch.maximum(one[split:], other[split:])])


def spread(own: Tensor, rank: int, world: int) -> Tensor:
    """A rank's vector with a slot per rank for its peaks: a sum over ranks then carries every rank's peaks too."""
    slots = own.new_zeros(world, len(PEAKS))
    slots[rank] = own[len(SUMS) :]
    return torch.cat([own[: len(SUMS)], slots.flatten()])  # (len(SUMS) + world * len(PEAKS),)


def distillation(total: Tensor) -> dict[str, float]:
    """The figures of an OPD step from the vectors of all ranks, spread and summed.

    kl/teacher_k1 = -mean A estimates KL(student || teacher) while the rollouts are the student's own; kl/rollout_k1 and
    k3 estimate KL(rollout policy || student); ratio/ess is the effective share of the tokens, (sum w)^2 / (N sum w^2).
    """
    sums, mean, peak = _read(total)
    quarters = {
        f"kl/teacher_q{number}": sums[f"gap_q{number}"] / max(sums[f"tokens_q{number}"], 1.0)
        for number in range(1, QUARTERS + 1)
    }
    return {
        "loss": sums["loss"] / (sums["weight"] or 1.0),
        "kl/teacher_k1": -mean["advantage"],
        "kl/teacher_k3": mean["teacher_k3"],
        **quarters,
        "kl/rollout_k1": -mean["drift"],
        "kl/rollout_k3": mean["rollout_k3"],
        "entropy": mean["entropy"],
        "advantage/mean": mean["advantage"],
        "advantage/std": math.sqrt(max(mean["advantage_sq"] - mean["advantage"] ** 2, 0.0)),
        "advantage/min": -peak["disadvantage"],
        "advantage/max": peak["advantage"],
        "ratio/mean": mean["ratio"],
        "ratio/max": peak["ratio"],
        "ratio/ess": mean["ratio"] ** 2 / max(mean["ratio_sq"], 1e-30),
        "ratio/clipped": mean["clipped"],
        "data/tokens": sums["tokens"],
    }


def imitation(total: Tensor) -> dict[str, float]:
    """The figures of an SFT step; the rollouts are the teacher's here, so their drift estimates the forward KL."""
    sums, mean, _ = _read(total)
    return {
        "loss": sums["loss"] / (sums["weight"] or 1.0),
        "entropy": mean["entropy"],
        "kl/forward_k1": -mean["drift"],
        "kl/forward_k3": mean["rollout_k3"],
        "data/tokens": sums["tokens"],
    }


def work(
    total: Tensor, *, seconds: float, ranks: int, token_budget: int, peak_flops: float | None
) -> dict[str, float | None]:
    """The figures of the work of a step, from the same total.

    Args:
        seconds: the step took, the wait for its batches included.
        peak_flops: floating-point operations a second of one rank's device; None where unknown, and so is the MFU.
    """
    sums, _, peak = _read(total)
    rate = sums["processed"] / seconds
    flops = sums["flops"] / seconds / ranks
    return {
        "data/processed_tokens": sums["processed"],
        "data/fill": sums["processed"] / max(sums["bins"] * token_budget, 1.0),
        "perf/tokens_per_s": rate,
        "perf/tokens_per_s_per_rank": rate / ranks,
        "perf/tflops": flops / 1e12,
        "perf/mfu": flops / peak_flops if peak_flops else None,
        "perf/peak_memory": peak["memory"],
        "time/step": seconds,
        "time/data": peak["wait"],
    }


def _read(total: Tensor) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Sums, means by token and peaks, by name."""
    sums: dict[str, float] = dict(zip(SUMS, total.tolist(), strict=False))
    means = {name: value / max(sums["tokens"], 1.0) for name, value in sums.items()}
    peaks = total[len(SUMS) :].reshape(-1, len(PEAKS)).amax(0).tolist()
    return sums, means, dict(zip(PEAKS, peaks, strict=True))


def _k3(log_ratio: Tensor) -> Tensor:
    """r - 1 - log r: unbiased for a KL, never negative (Schulman 2020, "Approximating KL divergence")."""
    return torch.expm1(log_ratio) - log_ratio


def _largest(values: Tensor) -> Tensor:
    """The largest value; minus infinity where there is none."""
    return torch.cat([values, values.new_full((1,), -math.inf)]).max()
