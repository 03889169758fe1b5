import pytest
import torch

from trainer import metrics


def tokens(count: int, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: -torch.rand(count) for name in ("student", "teacher", "rollout")}


def sums(part: dict[str, torch.Tensor], rank: int) -> torch.Tensor:
    student, ones = part["student"], torch.ones_like(part["student"])
    vector = metrics.token_sums(**part, entropy=ones, loss=student, weight=ones, max_importance_ratio=1.1)
    return metrics.with_peak(vector, (student - part["rollout"]).exp().max().item(), rank, world=2)


def test_ranks_add_up_to_the_figures_of_all_tokens():
    parts = [tokens(3, 0), tokens(17, 1)]
    figures = metrics.distillation(sums(parts[0], 0) + sums(parts[1], 1))
    student, teacher, rollout = (
        torch.cat([part[name] for part in parts]) for name in ("student", "teacher", "rollout")
    )
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


def test_the_loss_is_the_mean_by_weight_and_all_else_the_mean_by_token():
    part = tokens(4, 0)
    loss, weight = torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0])  # rollouts of 3 and 1
    vector = metrics.token_sums(**part, entropy=loss, loss=loss, weight=weight, max_importance_ratio=2.0)
    for figures in (metrics.distillation(metrics.with_peak(vector, 1.0, 0, 1)), metrics.imitation(vector)):
        assert figures["loss"] == pytest.approx(3.0)
        assert figures["entropy"] == pytest.approx(2.0)
