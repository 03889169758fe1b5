import torch

from trainer.logprobs import logprob_rows, score_tokens


def test_scores_and_gradients_equal_the_whole_log_softmax():
    torch.manual_seed(0)
    hidden, head = torch.randn(23, 8, requires_grad=True), (0.2 * torch.randn(31, 8)).requires_grad_()
    targets, ids = torch.randint(31, (23,)), torch.randint(31, (23, 3))
    scores = score_tokens(hidden, head, targets, ids, temperature=0.7, chunk=5)
    table = (hidden @ head.T / 0.7).log_softmax(-1)
    expected = table.gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(scores.chosen, expected)
    torch.testing.assert_close(scores.topk, table.gather(-1, ids))
    torch.testing.assert_close(scores.entropy, -(table.exp() * table).sum(-1).detach())
    assert not scores.entropy.requires_grad
    weights = torch.randn(23)
    ours = torch.autograd.grad((scores.chosen * weights).sum() + scores.topk.square().sum(), (hidden, head))
    whole = (expected * weights).sum() + table.gather(-1, ids).square().sum()
    for mine, true in zip(ours, torch.autograd.grad(whole, (hidden, head)), strict=True):
        torch.testing.assert_close(mine, true)


def test_the_head_is_float32_even_for_a_bfloat16_model():
    hidden, head = torch.randn(9, 8).bfloat16(), torch.randn(31, 8).bfloat16()
    scores = score_tokens(hidden, head, torch.arange(9), torch.zeros(9, 0, dtype=torch.long))
    expected = (hidden.float() @ head.float().T).log_softmax(-1).diagonal()
    assert scores.chosen.dtype == torch.float32
    torch.testing.assert_close(scores.chosen, expected[:9])


def test_no_tokens_score_as_nothing_but_carry_a_gradient():
    hidden, head = torch.randn(0, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
    scores = score_tokens(hidden, head, torch.zeros(0, dtype=torch.long), torch.zeros(0, 2, dtype=torch.long))
    scores.chosen.sum().backward()
    assert scores.topk.shape == (0, 2)
    assert head.grad is not None and head.grad.abs().sum() == 0


def test_rows_come_in_chunks_over_the_shared_vocabulary():
    hidden, head = torch.randn(10, 8), torch.randn(31, 8)
    pieces = list(logprob_rows(hidden, head, vocab=20, chunk=4))
    assert [len(piece) for piece in pieces] == [4, 4, 2]
    torch.testing.assert_close(torch.cat(pieces), (hidden @ head[:20].T).log_softmax(-1))
