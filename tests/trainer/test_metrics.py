import math

import pytest
import torch

from trainer import metrics


def tokens(count: int, seed: int) -> dict[str, torch.Tensor]:
    """`count` tokens, the last rollout of which has all of them."""
    torch.manual_seed(seed)
    return {
        **{name: -torch.rand(count) for name in ("student", "teacher", "rollout")},
        "position": torch.arange(count),
        "length": torch.full((count,), count),
    }


def sums(part: dict[str, torch.Tensor], **changes: torch.Tensor) -> torch.Tensor:
    ones = torch.ones_like(part["student"])
    values = {"entropy": ones, "loss": part["student"], "weight": ones, **part, **changes}
    return metrics.token_sums(**values, max_importance_ratio=1.1)


def over_ranks(*vectors: torch.Tensor) -> torch.Tensor:
    spread = [metrics.spread(own, rank, len(vectors)) for rank, own in enumerate(vectors)]
    return torch.stack(spread).sum(0)


def test_ranks_and_micro_batches_add_up_to_the_figures_of_all_tokens():
    parts = [tokens(3, 0), tokens(17, 1), tokens(6, 2)]
    figures = metrics.distillation(over_ranks(metrics.merged(sums(parts[0]), sums(parts[1])), sums(parts[2])))
    student, teacher, rollout = (
        torch.cat([part[name] for part in parts]) for name in ("student", "teacher", "rollout")
    )
    advantage, ratio = teacher - student, (student - rollout).exp()
    expected = {
        "data/tokens": torch.tensor(26.0),
        "kl/teacher_k1": -advantage.mean(),
        "kl/teacher_k3": (advantage.exp() - 1 - advantage).mean(),
        "kl/rollout_k1": (rollout - student).mean(),
        "kl/rollout_k3": (ratio - 1 - ratio.log()).mean(),
        "advantage/mean": advantage.mean(),
        "advantage/std": advantage.std(correction=0),
        "advantage/min": advantage.min(),
        "advantage/max": advantage.max(),
        "ratio/mean": ratio.mean(),
        "ratio/max": ratio.max(),
        "ratio/ess": ratio.sum() ** 2 / (26 * ratio.square().sum()),
        "ratio/clipped": (ratio > 1.1).float().mean(),
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value.item(), abs=1e-5), name


def test_quartiles_are_of_the_place_in_the_own_completion():
    gap = torch.tensor([1.0, 2, 3, 4, 10, 20, 30, 40, 50, 60, 70, 80, 7.0])
    places = {
        "position": torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 0]),
        "length": torch.tensor([4] * 4 + [8] * 8 + [1]),
    }
    part = {"student": -gap, "teacher": -2 * gap, "rollout": -gap, **places}
    figures = metrics.distillation(over_ranks(sums(part)))
    expected = [(1 + 10 + 20 + 7) / 4, (2 + 30 + 40) / 3, (3 + 50 + 60) / 3, (4 + 70 + 80) / 3]
    assert [figures[f"kl/teacher_q{number}"] for number in range(1, 5)] == pytest.approx(expected)


def test_a_rank_without_tokens_changes_nothing():
    part = tokens(5, 0)
    part["teacher"] = part["student"] - 1.0  # every advantage is negative, so that a 0 for a maximum would show
    one = sums(part)
    alone = metrics.distillation(over_ranks(one))
    assert metrics.distillation(over_ranks(one, metrics.vector())) == alone
    empty = {name: values[:0] for name, values in part.items()}
    assert metrics.distillation(over_ranks(metrics.merged(one, sums(empty)))) == alone
    assert alone["advantage/max"] == pytest.approx(-1.0)


def test_the_loss_is_the_mean_by_weight_and_all_else_the_mean_by_token():
    loss, weight = torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0])  # rollouts of 3 and 1
    total = over_ranks(sums(tokens(4, 0), loss=loss * weight, weight=weight, entropy=loss))
    for figures in (metrics.distillation(total), metrics.imitation(total)):
        assert figures["loss"] == pytest.approx(3.0)
        assert figures["entropy"] == pytest.approx(2.0)


def test_an_unscored_dataset_has_its_figures_all_the_same():
    part = tokens(4, 0)
    part["teacher"] = torch.full((4,), math.nan)
    figures = metrics.imitation(over_ranks(sums(part)))
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["kl/forward_k1"] == pytest.approx((part["rollout"] - part["student"]).mean().item(), abs=1e-6)


def test_the_work_of_all_ranks_is_one_step():
    vectors = [
        metrics.vector(processed=900, bins=1, flops=6e12, wait=0.5, memory=3e9),
        metrics.vector(processed=300, bins=2, flops=2e12, wait=0.1, memory=7e9),
    ]
    total = over_ranks(*vectors)
    figures = metrics.work(total, seconds=2.0, ranks=2, token_budget=1000, peak_flops=4e12)
    assert figures == {
        "data/processed_tokens": 1200,
        "data/fill": 0.4,
        "perf/tokens_per_s": 600,
        "perf/tokens_per_s_per_rank": 300,
        "perf/tflops": 2.0,
        "perf/mfu": 0.5,
        "perf/peak_memory": 7e9,
        "time/step": 2.0,
        "time/data": 0.5,
    }
    assert metrics.work(total, seconds=2.0, ranks=2, token_budget=1000, peak_flops=None)["perf/mfu"] is None
