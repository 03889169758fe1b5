import pytest
import torch

from trainer import metrics
from trainer.objectives import Tokens


def tokens(count: int, seed: int) -> Tokens:
    torch.manual_seed(seed)
    student, teacher, rollout = (-torch.rand(count) for _ in range(3))
    none = torch.zeros(count, 0)
    return Tokens(student, teacher, rollout, torch.zeros(count).long(), none.long(), none, none)


def sums(part: Tokens, rank: int) -> torch.Tensor:
    vector = metrics.token_sums(part, torch.ones(len(part.ids)), part.student, max_importance_ratio=1.1)
    return metrics.with_peak(vector, (part.student - part.rollout).exp().max().item(), rank, world=2)


def test_ranks_add_up_to_the_figures_of_all_tokens():
    parts = [tokens(3, 0), tokens(17, 1)]
    figures = metrics.distillation(sums(parts[0], 0) + sums(parts[1], 1))
    student, teacher, rollout = (torch.cat([part[column] for part in parts]) for column in range(3))
    ratio = (student - rollout).exp()
    assert figures["data/tokens"] == 20
    assert figures["kl/teacher_k1"] == pytest.approx((student - teacher).mean().item(), abs=1e-6)
    assert figures["ratio/max"] == pytest.approx(ratio.max().item())
    assert figures["ratio/ess"] == pytest.approx((ratio.sum() ** 2 / (20 * ratio.square().sum())).item())
    assert figures["ratio/clipped"] == pytest.approx((ratio > 1.1).float().mean().item())
    assert figures["advantage/std"] == pytest.approx((teacher - student).std(correction=0).item(), abs=1e-5)


def test_a_rank_without_tokens_changes_nothing():
    one = sums(tokens(5, 0), 0)
    empty = metrics.with_peak(torch.zeros(len(metrics.SUMS), dtype=torch.float64), 0.0, 1, world=2)
    assert metrics.distillation(one + empty) == metrics.distillation(one)
