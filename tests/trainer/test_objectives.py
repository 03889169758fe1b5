import math

import pytest
import torch
from torch import Tensor

from trainer import objectives
from trainer.objectives import Tokens

VOCAB = 7


def tables(seed: int = 0, scale: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student, teacher and rollout policy at five states, (5, VOCAB)."""
    torch.manual_seed(seed)
    return tuple(scale * torch.randn(5, VOCAB) for _ in range(3))  # type: ignore[return-value]


def tokens_of(student: Tensor, teacher: Tensor, rollout: Tensor, ids: Tensor, k: int = 0) -> Tokens:
    """What the trainer would know of these tokens, log-probs from logits."""
    p, q, r = (logits.log_softmax(-1) for logits in (student, teacher, rollout))
    best = q.topk(k)
    return Tokens(
        student=p.gather(-1, ids[:, None])[:, 0],
        teacher=q.gather(-1, ids[:, None])[:, 0],
        rollout=r.gather(-1, ids[:, None])[:, 0],
        ids=ids,
        topk_ids=best.indices,
        topk_teacher=best.values,
        topk_student=p.gather(-1, best.indices),
    )


def gradient(loss_of, student: Tensor) -> Tensor:
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss_of(student).sum(), student)[0]


def score_function(student: Tensor, ids: Tensor) -> Tensor:
    """d log p(id) / d logits = one-hot(id) - p, by hand."""
    return torch.nn.functional.one_hot(ids, VOCAB) - student.softmax(-1)


def test_paper_is_the_advantage_times_the_score():
    student, teacher, rollout = tables()
    ids = torch.tensor([0, 3, 6, 3, 1])
    tokens = tokens_of(student, teacher, rollout, ids)
    expected = -(tokens.teacher - tokens.student)[:, None] * score_function(student, ids)
    got = gradient(lambda s: objectives.paper(tokens_of(s, teacher, rollout, ids)), student)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("bound", [0.5, 2.0, math.inf])
def test_importance_weighs_the_papers_gradient(bound):
    student, teacher, rollout = tables()
    ids = torch.tensor([0, 3, 6, 3, 1])
    tokens = tokens_of(student, teacher, rollout, ids)
    weight = (tokens.student - tokens.rollout).exp().clamp(max=bound)[:, None]
    expected = -weight * (tokens.teacher - tokens.student)[:, None] * score_function(student, ids)
    got = gradient(lambda s: objectives.importance(tokens_of(s, teacher, rollout, ids), bound), student)
    torch.testing.assert_close(got, expected)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_importance_expects_the_exact_reverse_kl_gradient_of_stale_rollouts():
    student, teacher, rollout = tables()
    exact = gradient(lambda s: reverse_kl(s, teacher), student)

    def expected(objective) -> Tensor:
        total = torch.zeros_like(student)
        for action in range(VOCAB):
            ids = torch.full((5,), action)
            chance = rollout.softmax(-1)[:, action : action + 1]
            total += chance * gradient(lambda s, ids=ids: objective(tokens_of(s, teacher, rollout, ids)), student)
        return total

    torch.testing.assert_close(expected(lambda t: objectives.importance(t, math.inf)), exact)
    assert not torch.allclose(expected(objectives.paper), exact, atol=1e-2)  # what staleness does to the plain one


def test_topk_over_the_whole_vocabulary_is_the_full_reverse_kl():
    student, teacher, rollout = tables()
    ids = torch.tensor([0, 3, 6, 3, 1])
    loss = objectives.topk(tokens_of(student, teacher, rollout, ids, k=VOCAB))
    torch.testing.assert_close(loss, reverse_kl(student, teacher), atol=1e-5, rtol=1e-5)
    got = gradient(lambda s: objectives.topk(tokens_of(s, teacher, rollout, ids, k=VOCAB)), student)
    torch.testing.assert_close(got, gradient(lambda s: reverse_kl(s, teacher), student), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_topk_is_the_kl_between_buckets(k):
    student, teacher, rollout = tables()
    ids = teacher.argsort(-1)[:, 0]  # the teacher's least likely: a bucket of its own
    ids[0] = teacher[0].argmax()  # and here one of the top-k

    def brute_force(s: Tensor) -> Tensor:
        losses = []
        for state in range(5):
            named = sorted({*teacher[state].topk(k).indices.tolist(), int(ids[state])})
            p, q = s[state].softmax(-1), teacher[state].softmax(-1)
            p = torch.cat([p[named], (1 - p[named].sum())[None]])
            q = torch.cat([q[named], (1 - q[named].sum())[None]])
            losses.append((p * (p / q).log()).sum())
        return torch.stack(losses)

    loss = objectives.topk(tokens_of(student, teacher, rollout, ids, k=k))
    torch.testing.assert_close(loss, brute_force(student), atol=1e-5, rtol=1e-5)
    assert (loss <= reverse_kl(student, teacher) + 1e-5).all()
    got = gradient(lambda s: objectives.topk(tokens_of(s, teacher, rollout, ids, k=k)), student)
    torch.testing.assert_close(got, gradient(brute_force, student), atol=1e-5, rtol=1e-4)


def test_topk_stays_finite_where_the_rest_vanishes_or_the_columns_overflow_one():
    student, teacher, rollout = tables(scale=60.0)  # nearly one-hot on both sides
    ids = torch.tensor([0, 3, 6, 3, 1])
    tokens = tokens_of(student, teacher, rollout, ids, k=2)
    lifted = tokens._replace(topk_teacher=tokens.topk_teacher + 1e-4)  # as far as the schema lets rounding go
    assert objectives.topk(lifted).isfinite().all()
    assert gradient(lambda s: objectives.topk(tokens_of(s, teacher, rollout, ids, k=2)), student).isfinite().all()


@pytest.mark.parametrize("objective", ["paper", "importance", "topk"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(objective):
    student, _, rollout = tables()
    ids = torch.tensor([0, 3, 6, 3, 1])

    def loss_of(s: Tensor) -> Tensor:
        return objectives.token_loss(objective, tokens_of(s, student, rollout, ids, k=3), max_importance_ratio=2.0)

    assert (objectives.advantage(tokens_of(student, student, rollout, ids)) == 0).all()
    assert gradient(loss_of, student).abs().max() < 1e-6
