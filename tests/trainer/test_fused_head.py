"""The loss through the head against autograd over the whole matrix of logits."""

import pytest
import torch
from torch import Tensor

from trainer.fused_head import head_loss
from trainer.logprobs import Scores, score_tokens

WIDTH, VOCAB, TOKENS, K = 8, 31, 23, 3


def example(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    head = (0.3 * torch.randn(VOCAB, WIDTH)).to(dtype).requires_grad_()
    return hidden, head, torch.randint(VOCAB, (TOKENS,)), torch.randint(VOCAB, (TOKENS, K))


def in_float64(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()


def crooked(rows: slice, scores: Scores) -> Tensor:
    """A loss that is nonlinear in every score, differs from token to token, and detaches, as an objective may."""
    factor = torch.arange(TOKENS, device=scores.chosen.device)[rows] / TOKENS - 0.4
    likely = (scores.topk.exp() * (scores.topk + 1.5)).sum(-1)
    return (
        factor * scores.chosen.detach().exp() * scores.chosen + likely + 0.1 * scores.entropy * scores.chosen.square()
    )


def whole(hidden: Tensor, head: Tensor, targets: Tensor, ids: Tensor) -> tuple[Tensor, Scores]:
    """The same by plain autograd, all logits at once."""
    logps = (hidden @ head.T).log_softmax(-1)
    scores = Scores(
        logps.gather(-1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1).detach(), logps.gather(-1, ids)
    )
    return crooked(slice(None), scores), scores


@pytest.mark.parametrize("chunk", [1, 5, TOKENS, 100])
def test_loss_and_gradients_equal_those_of_the_whole_matrix(chunk):
    hidden, head, targets, ids = example(torch.float32)
    ours = head_loss(hidden, head, targets, ids, crooked, chunk=chunk)
    exact = in_float64(hidden, head)
    losses, scores = whole(*exact, targets, ids)
    torch.testing.assert_close(ours.losses.double(), losses.detach(), rtol=1e-5, atol=1e-6)
    for mine, true in zip(ours.scores, scores, strict=True):
        torch.testing.assert_close(mine.double(), true.detach(), rtol=1e-5, atol=1e-6)
    mine = torch.autograd.grad(3.0 * ours.total, (hidden, head))
    for one, true in zip(mine, torch.autograd.grad(3.0 * losses.sum(), exact), strict=True):
        torch.testing.assert_close(one.double(), true, rtol=1e-4, atol=1e-5)


def test_one_id_asked_twice_and_the_target_among_the_top_k_add_up():
    hidden, head, targets, ids = example(torch.float32)
    ids[:, 1], ids[:, 2] = ids[:, 0], targets
    exact = in_float64(hidden, head)
    ours = head_loss(hidden, head, targets, ids, crooked, chunk=7)
    truth = torch.autograd.grad(whole(*exact, targets, ids)[0].sum(), exact)
    for one, true in zip(torch.autograd.grad(ours.total, (hidden, head)), truth, strict=True):
        torch.testing.assert_close(one.double(), true, rtol=1e-4, atol=1e-5)


def test_bfloat16_log_probs_are_those_of_exact_products():
    hidden, head, targets, ids = example(torch.bfloat16)
    ours = head_loss(hidden, head, targets, ids, crooked)
    exact = in_float64(hidden, head)
    losses, scores = whole(*exact, targets, ids)
    torch.testing.assert_close(ours.scores.chosen.double(), scores.chosen.detach(), rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(ours.total, (hidden, head))
    for one, true in zip(mine, torch.autograd.grad(losses.sum(), exact), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - true).norm() <= 6e-3 * true.norm()


def test_it_says_what_scoring_says():
    hidden, head, targets, ids = example(torch.bfloat16)
    ours = head_loss(hidden, head, targets, ids, crooked, chunk=5)
    for mine, scored in zip(ours.scores, score_tokens(hidden, head, targets, ids, chunk=5), strict=True):
        assert torch.equal(mine, scored)


def test_only_the_total_carries_a_gradient():
    hidden, head, targets, ids = example(torch.float32)
    ours = head_loss(hidden, head, targets, ids, crooked)
    assert ours.total.requires_grad
    assert not any(column.requires_grad for column in (ours.losses, *ours.scores))


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same():
    hidden, head, targets, ids = example(torch.float32)
    (trained, _) = torch.autograd.grad(head_loss(hidden, head, targets, ids, crooked).total, (hidden, head))
    frozen = head_loss(hidden, head.detach(), targets, ids, crooked)
    assert torch.equal(torch.autograd.grad(frozen.total, hidden)[0], trained)


def test_without_gradients_it_only_computes():
    hidden, head, targets, ids = example(torch.float32)
    with torch.no_grad():
        ours = head_loss(hidden, head, targets, ids, crooked)
    assert not ours.total.requires_grad and ours.total.isfinite()


def test_no_tokens_are_no_loss_and_an_exact_zero_gradient():
    hidden, head, targets, ids = example(torch.float32)
    none = head_loss(hidden[:0], head, targets[:0], ids[:0], lambda rows, scores: -scores.chosen)
    none.total.backward()
    assert none.total == 0 and len(none.losses) == 0
    assert head.grad is not None and not head.grad.any()
