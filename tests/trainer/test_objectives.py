"""Brute force: over a small vocabulary every token can be tried, so every expectation is exact."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.trainer.states import IDS, expected_gradient, gradient, kl, score_function, tables, tokens_of
from trainer import objectives
from trainer.objectives import token_loss

SEEDS = range(3)


def test_paper_is_the_advantage_times_the_score():
    student, teacher, rollout = tables()
    tokens = tokens_of(student, teacher, rollout)
    expected = -(tokens.teacher - tokens.student)[:, None] * score_function(student)
    got = gradient(lambda s: objectives.paper(tokens_of(s, teacher, rollout)), student)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("bound", [0.5, 2.0, math.inf])
def test_importance_weighs_the_papers_gradient(bound):
    student, teacher, rollout = tables()
    tokens = tokens_of(student, teacher, rollout)
    weight = (tokens.student - tokens.rollout).exp().clamp(max=bound)[:, None]
    expected = -weight * (tokens.teacher - tokens.student)[:, None] * score_function(student)
    got = gradient(lambda s: objectives.importance(tokens_of(s, teacher, rollout), bound), student)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_importance_expects_the_exact_reverse_kl_gradient_of_stale_rollouts(seed):
    student, teacher, rollout = tables(seed)
    got = expected_gradient(partial(objectives.importance, max_ratio=math.inf), student, teacher, rollout)
    torch.testing.assert_close(got, gradient(lambda s: kl(s, teacher), student))


@pytest.mark.parametrize("seed", SEEDS)
def test_paper_expects_the_reverse_kl_gradient_of_fresh_rollouts_and_of_no_others(seed):
    student, teacher, stale = tables(seed)
    exact = gradient(lambda s: kl(s, teacher), student)
    torch.testing.assert_close(expected_gradient(objectives.paper, student, teacher, rollout=student), exact)
    assert not torch.allclose(expected_gradient(objectives.paper, student, teacher, stale), exact, atol=1e-2)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_proximal_expects_the_reverse_kl_gradient_to_the_mixture_of_fresh_rollouts(alpha):
    student, teacher, stale = tables()
    mixture = (alpha * teacher.softmax(-1) + (1 - alpha) * student.softmax(-1)).log()  # held fixed
    exact = gradient(lambda s: kl(s, mixture), student)
    loss = partial(objectives.proximal, alpha=alpha)
    torch.testing.assert_close(expected_gradient(loss, student, teacher, rollout=student), exact)
    assert not torch.allclose(expected_gradient(loss, student, teacher, stale), exact, atol=1e-2)


def test_proximal_of_the_teacher_alone_is_the_papers():
    student, teacher, rollout = tables()
    tokens = tokens_of(student, teacher, rollout)
    torch.testing.assert_close(objectives.proximal(tokens, 1.0), objectives.paper(tokens))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.99])
def test_the_proximal_advantage_has_a_floor_and_the_sign_of_the_plain_one(alpha):
    gap = torch.tensor([-1e4, -50.0, -1.0, 0.0, 1.0, 50.0])
    tokens = tokens_of(*tables())._replace(student=torch.full((6,), -60.0), teacher=gap - 60)
    bounded = objectives.proximal_advantage(tokens, alpha)
    assert (bounded >= math.log(1 - alpha) - 1e-6).all()
    assert bounded[0].item() == pytest.approx(math.log(1 - alpha), rel=1e-5)
    assert (bounded.diff()[1:] > 0).all() and bounded[3].item() == pytest.approx(0.0, abs=1e-6)
    assert bounded[5].item() == pytest.approx(50 + math.log(alpha), rel=1e-5)


@pytest.mark.parametrize("objective", ["paper", "importance", "proximal"])
def test_a_clipped_advantage_is_bounded_on_both_sides(objective):
    student, teacher, rollout = tables()
    clipped = partial(token_loss, objective, max_importance_ratio=2.0, clip_advantage=0.3, proximal_alpha=0.9)
    tokens = tokens_of(student, teacher, rollout)
    plain = (
        objectives.proximal_advantage(tokens, 0.9) if objective == "proximal" else objectives.advantage(tokens)
    ).clamp(-0.3, 0.3)
    assert plain.min() == -0.3 and plain.max() == 0.3, "both bounds must bite for this test to mean anything"
    weight = objectives.importance_ratio(tokens).clamp(max=2.0) if objective == "importance" else torch.ones(5)
    got = gradient(lambda s: clipped(tokens_of(s, teacher, rollout)), student)
    torch.testing.assert_close(got, -(weight * plain)[:, None] * score_function(student))


@pytest.mark.parametrize("objective", ["paper", "importance", "proximal"])
def test_a_bound_that_nothing_reaches_changes_nothing(objective):
    tokens = tokens_of(*tables())
    loss = partial(token_loss, objective, tokens, max_importance_ratio=2.0)
    assert torch.equal(loss(clip_advantage=100.0), loss())


@pytest.mark.parametrize("seed", SEEDS)
def test_the_anchor_expects_the_gradient_of_the_kl_to_the_rollout_policy(seed):
    student, teacher, rollout = tables(seed)
    got = expected_gradient(partial(objectives.anchor, max_ratio=math.inf), student, teacher, rollout)
    torch.testing.assert_close(got, gradient(lambda s: kl(s, rollout), student))


def test_the_anchor_is_at_rest_where_the_student_is_the_rollout_policy():
    student, teacher, _ = tables()
    got = gradient(lambda s: objectives.anchor(tokens_of(s, teacher, rollout=student), 2.0), student)
    assert got.abs().max() == 0


def test_the_bound_of_the_anchors_weight_keeps_its_direction():
    student, teacher, rollout = tables()
    tokens = tokens_of(student, teacher, rollout)
    drift = tokens.student - tokens.rollout
    assert drift.exp().max() > 1.5, "the bound must bite for this test to mean anything"
    expected = (drift.exp().clamp(max=1.5) * drift)[:, None] * score_function(student)
    got = gradient(lambda s: objectives.anchor(tokens_of(s, teacher, rollout), 1.5), student)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("objective", ["paper", "importance", "proximal", "topk"])
def test_the_anchor_adds_to_any_objective(objective):
    student, teacher, rollout = tables()

    def loss_of(s: Tensor, weight: float) -> Tensor:
        tokens = tokens_of(s, teacher, rollout, k=3)
        return token_loss(objective, tokens, max_importance_ratio=2.0, anchor_weight=weight)

    added = gradient(lambda s: loss_of(s, 0.25), student) - gradient(lambda s: loss_of(s, 0.0), student)
    pull = gradient(lambda s: objectives.anchor(tokens_of(s, teacher, rollout), 2.0), student)
    torch.testing.assert_close(added, 0.25 * pull, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("objective", ["paper", "importance", "proximal", "topk"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(objective):
    student, _, rollout = tables()

    def loss_of(s: Tensor) -> Tensor:
        return token_loss(objective, tokens_of(s, student, rollout, k=3), max_importance_ratio=2.0)

    assert (objectives.advantage(tokens_of(student, student, rollout)) == 0).all()
    assert gradient(loss_of, student).abs().max() < 1e-6


def test_imitation_raises_the_sampled_tokens():
    student, teacher, rollout = tables()
    got = gradient(lambda s: objectives.imitation(tokens_of(s, teacher, rollout)), student)
    torch.testing.assert_close(got, -score_function(student, IDS))
