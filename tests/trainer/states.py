"""A handful of states over a small vocabulary, where every expectation can be summed by hand."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from trainer.objectives import Tokens

STATES, VOCAB = 5, 7
IDS = torch.tensor([0, 3, 6, 3, 1])
"""A sampled token for each state."""

Loss = Callable[[Tokens], Tensor]


def tables(seed: int = 0, scale: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student, teacher and rollout policy, (STATES, VOCAB) each."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher, rollout = (scale * torch.randn(STATES, VOCAB, generator=generator) for _ in range(3))
    return student, teacher, rollout


def tokens_of(student: Tensor, teacher: Tensor, rollout: Tensor, ids: Tensor = IDS, k: int = 0) -> Tokens:
    """What the trainer would know of these tokens, one completion of them, from logits."""
    p, q, r = (logits.log_softmax(-1) for logits in (student, teacher, rollout))
    best = q.topk(k)
    return Tokens(
        student=p.gather(-1, ids[:, None])[:, 0],
        teacher=q.gather(-1, ids[:, None])[:, 0],
        rollout=r.gather(-1, ids[:, None])[:, 0],
        ids=ids,
        entropy=-(p.exp() * p).sum(-1).detach(),
        position=torch.arange(len(ids)),
        length=torch.full((len(ids),), len(ids)),
        topk_ids=best.indices,
        topk_teacher=best.values,
        topk_student=p.gather(-1, best.indices),
    )


def gradient(loss_of: Callable[[Tensor], Tensor], student: Tensor) -> Tensor:
    """d sum of losses / d student logits."""
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss_of(student).sum(), student)[0]


def expected_gradient(loss: Loss, student: Tensor, teacher: Tensor, rollout: Tensor, k: int = 0) -> Tensor:
    """The gradient expected at each state over all tokens that the rollout policy could have sampled there."""
    total = torch.zeros_like(student)
    for action in range(VOCAB):
        ids = torch.full((STATES,), action)
        chance = rollout.softmax(-1)[:, action, None]
        total += chance * gradient(lambda s, ids=ids: loss(tokens_of(s, teacher, rollout, ids, k)), student)
    return total


def score_function(student: Tensor, ids: Tensor = IDS) -> Tensor:
    """d log p(id) / d logits = one-hot(id) - p, by hand."""
    return one_hot(ids, VOCAB) - student.softmax(-1)


def kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL(ours || theirs) of logits over the whole vocabulary, (STATES,)."""
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
