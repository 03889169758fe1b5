"""KL over the teacher's top-k, the sampled token and the rest, against KLs summed by hand."""

import pytest
import torch
from torch import Tensor

from tests.trainer.states import IDS, STATES, VOCAB, gradient, kl, tables, tokens_of
from trainer import objectives

KINDS = ["reverse", "forward", "mixed"]
SHARE = 0.3


def full(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    reverse, forward = kl(student, teacher), kl(teacher, student)
    return {"reverse": reverse, "forward": forward, "mixed": 0.7 * reverse + 0.3 * forward}[kind]


def buckets(kind: str, student: Tensor, teacher: Tensor, ids: Tensor, k: int) -> Tensor:
    """The KL between bucket masses, state by state, with no care for rounding."""
    losses = []
    for state in range(STATES):
        named = sorted({*teacher[state].topk(k).indices.tolist(), int(ids[state])})
        masses = []
        for logits in (student, teacher):
            p = logits[state].softmax(-1)
            masses.append(torch.cat([p[named], (1 - p[named].sum())[None]]).log())
        losses.append(full(kind, masses[0], masses[1]))
    return torch.stack(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_over_the_whole_vocabulary_it_is_the_full_kl(kind):
    student, teacher, rollout = tables()

    def loss_of(s: Tensor) -> Tensor:
        return objectives.topk(tokens_of(s, teacher, rollout, k=VOCAB), kind, SHARE)

    torch.testing.assert_close(loss_of(student), full(kind, student, teacher), atol=1e-5, rtol=1e-5)
    exact = gradient(lambda s: full(kind, s, teacher), student)
    torch.testing.assert_close(gradient(loss_of, student), exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_kl_between_buckets(kind, k):
    student, teacher, rollout = tables()
    ids = teacher.argmin(-1)  # a bucket of its own
    ids[0] = teacher[0].argmax()  # and here one of the top-k

    def loss_of(s: Tensor) -> Tensor:
        return objectives.topk(tokens_of(s, teacher, rollout, ids, k), kind, SHARE)

    torch.testing.assert_close(loss_of(student), buckets(kind, student, teacher, ids, k), atol=1e-5, rtol=1e-5)
    exact = gradient(lambda s: buckets(kind, s, teacher, ids, k), student)
    torch.testing.assert_close(gradient(loss_of, student), exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_it_grows_with_k_up_to_the_full_kl(kind, seed):
    student, teacher, rollout = tables(seed)
    losses = [objectives.topk(tokens_of(student, teacher, rollout, k=k), kind, SHARE) for k in range(1, VOCAB + 1)]
    assert (torch.stack(losses).diff(dim=0) > -1e-5).all()
    assert (losses[0] < losses[-1] - 1e-3).any(), "one bucket must hide something for this test to mean anything"
    assert (losses[-1] <= full(kind, student, teacher) + 1e-5).all()


def test_without_the_rest_the_student_could_hide_mass():
    """The gradient towards a token that no bucket names: reverse KL pulls its mass out of the tail."""
    student, teacher, rollout = torch.zeros(STATES, VOCAB), torch.zeros(STATES, VOCAB), torch.zeros(STATES, VOCAB)
    teacher[:, 0] = 5.0
    student[:, VOCAB - 1] = 5.0  # nearly all of the student's mass lies where neither top-k nor sample is
    ids = torch.ones(STATES, dtype=torch.int64)
    got = gradient(lambda s: objectives.topk(tokens_of(s, teacher, rollout, ids, k=1)), student)
    assert (got[:, VOCAB - 1] > 0.05).all()
    assert objectives.topk(tokens_of(student, teacher, rollout, ids, k=1)).min() > 2.0


def test_a_sampled_token_of_the_top_k_is_counted_once():
    student, teacher, rollout = tables()
    inside = teacher.argmax(-1)
    named = tokens_of(student, teacher, rollout, inside, k=2)
    elsewhere = named._replace(ids=torch.full((STATES,), VOCAB), student=torch.full((STATES,), -100.0))
    elsewhere = elsewhere._replace(teacher=torch.full((STATES,), -100.0))  # a sampled token of no mass to speak of
    torch.testing.assert_close(objectives.topk(named), objectives.topk(elsewhere), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_it_stays_finite_where_the_rest_vanishes_or_the_columns_overflow_one(kind):
    student, teacher, rollout = tables(scale=30.0)  # nearly one-hot on both sides
    tokens = tokens_of(student, teacher, rollout, IDS, k=2)
    lifted = tokens._replace(topk_teacher=tokens.topk_teacher + 1e-4)  # as far as the schema lets rounding go
    assert objectives.topk(lifted, kind).isfinite().all()
    got = gradient(lambda s: objectives.topk(tokens_of(s, teacher, rollout, IDS, k=2), kind), student)
    assert got.isfinite().all()


def test_a_token_the_teacher_never_says_makes_the_reverse_kl_infinite_and_leaves_the_forward_alone():
    student, teacher, rollout = tables()
    teacher[:, 2] = -torch.inf
    ids = torch.full((STATES,), 2)
    tokens = tokens_of(student, teacher, rollout, ids, k=3)
    assert objectives.topk(tokens).isposinf().all()
    assert objectives.topk(tokens, "mixed").isposinf().all()

    def loss_of(s: Tensor) -> Tensor:
        return objectives.topk(tokens_of(s, teacher, rollout, ids, k=VOCAB), "forward")

    q, p = teacher.softmax(-1), student.log_softmax(-1)
    exact = torch.special.entr(q).sum(-1).neg() - (q * p).sum(-1)
    torch.testing.assert_close(loss_of(student), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient(loss_of, student), student.softmax(-1) - q, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_certain_leaves_a_finite_loss(kind):
    student, _, rollout = tables()
    teacher = torch.full((STATES, VOCAB), -1e4)
    teacher[:, 4] = 0.0
    tokens = tokens_of(student, teacher, rollout, ids=torch.full((STATES,), 4), k=1)
    assert (tokens.teacher == 0).all()

    def loss_of(s: Tensor) -> Tensor:
        return objectives.topk(tokens_of(s, teacher, rollout, tokens.ids, k=1), kind)

    assert loss_of(student).isfinite().all()
    assert (gradient(loss_of, student)[:, 4] < 0).all()  # towards the certain token
