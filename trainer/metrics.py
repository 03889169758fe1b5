"""The numbers of a step as sums, so that ranks add up exactly: a mean of means is nobody's mean.

A rank's sums are one float64 vector; the vectors of all ranks are added in a single all-reduce (`world.py`), and only
then become ratios.
"""

import math

import torch
from torch import Tensor

SUMS = (
    "tokens", "weight", "loss", "advantage", "advantage_sq", "teacher_k3", "rollout_k3", "ratio", "ratio_sq", "clipped",
    "entropy",
)  # fmt: skip
"""Order of the summed numbers in the vector; after them follows one slot per rank for its largest ratio."""


def token_sums(
    *,
    student: Tensor,
    teacher: Tensor,
    rollout: Tensor,
    entropy: Tensor,
    loss: Tensor,
    weight: Tensor,
    max_importance_ratio: float,
) -> Tensor:
    """Sums over the tokens of one micro-batch, (len(SUMS),) float64; NaN columns of an unscored dataset stay NaN.

    Only the loss is weighted: it is then the mean that was trained, while all else is told per token.
    """
    student = student.detach()
    advantage = teacher - student
    drift = student - rollout
    ratio = drift.exp()
    columns = (
        torch.ones_like(student),
        weight,
        loss.detach() * weight,
        advantage,
        advantage.square(),
        _k3(advantage),
        _k3(drift),
        ratio,
        ratio.square(),
        (ratio > max_importance_ratio).float(),
        entropy,
    )
    return torch.stack([column.double().sum() for column in columns])


def _k3(log_ratio: Tensor) -> Tensor:
    """r - 1 - log r: unbiased for a KL, never negative (Schulman 2020, "Approximating KL divergence")."""
    return torch.expm1(log_ratio) - log_ratio


def with_peak(sums: Tensor, peak: float, rank: int, world: int) -> Tensor:
    """Append one slot per rank holding its largest ratio: a sum over ranks then carries every rank's maximum too."""
    slots = sums.new_zeros(world)
    slots[rank] = peak
    return torch.cat([sums, slots])  # (len(SUMS) + world,)


def distillation(total: Tensor) -> dict[str, float]:
    """The figures of an OPD step from the vector summed over ranks.

    kl/teacher_k1 = -mean A estimates KL(student || teacher) while the rollouts are the student's own; ratio/ess is the
    effective share of the tokens, (sum w)^2 / (N sum w^2).
    """
    count, mean = _means(total)
    return {
        "loss": mean["loss"],
        "kl/teacher_k1": -mean["advantage"],
        "kl/teacher_k3": mean["teacher_k3"],
        "kl/rollout_k3": mean["rollout_k3"],
        "advantage/std": math.sqrt(max(mean["advantage_sq"] - mean["advantage"] ** 2, 0.0)),
        "ratio/mean": mean["ratio"],
        "ratio/max": total[len(SUMS) :].max().item(),
        "ratio/ess": mean["ratio"] ** 2 / max(mean["ratio_sq"], 1e-30),
        "ratio/clipped": mean["clipped"],
        "entropy": mean["entropy"],
        "data/tokens": count,
    }


def imitation(total: Tensor) -> dict[str, float]:
    """The figures of an SFT step; the rollouts are the teacher's here, so their drift estimates the forward KL."""
    count, mean = _means(total)
    return {"loss": mean["loss"], "entropy": mean["entropy"], "kl/forward_k3": mean["rollout_k3"], "data/tokens": count}


def _means(total: Tensor) -> tuple[float, dict[str, float]]:
    values = dict(zip(SUMS, total.tolist(), strict=False))
    count = values["tokens"]
    means = {name: value / max(count, 1.0) for name, value in values.items()}
    return count, means | {"loss": values["loss"] / (values["weight"] or 1.0)}
