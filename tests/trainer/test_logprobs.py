from typing import Any

import torch

from trainer.logprobs import logprob_rows, products_of, score_tokens


def test_scores_equal_the_whole_log_softmax():
    torch.manual_seed(0)
    hidden, head = torch.randn(23, 8), 0.2 * torch.randn(31, 8)
    targets, ids = torch.randint(31, (23,)), torch.randint(31, (23, 3))
    scores = score_tokens(hidden, head, targets, ids, temperature=0.7, chunk=5)
    table = (hidden @ head.T / 0.7).log_softmax(-1)
    torch.testing.assert_close(scores.chosen, table.gather(-1, targets[:, None])[:, 0])
    torch.testing.assert_close(scores.topk, table.gather(-1, ids))
    torch.testing.assert_close(scores.entropy, -(table.exp() * table).sum(-1))


def test_the_head_is_float32_even_for_a_bfloat16_model():
    hidden, head = torch.randn(9, 8).bfloat16(), torch.randn(31, 8).bfloat16()
    scores = score_tokens(hidden, head, torch.arange(9), torch.zeros(9, 0, dtype=torch.long))
    expected = (hidden.float() @ head.float().T).log_softmax(-1).diagonal()
    assert scores.chosen.dtype == torch.float32
    torch.testing.assert_close(scores.chosen, expected[:9])


def test_no_tokens_score_as_nothing():
    hidden, head = torch.randn(0, 8), torch.randn(31, 8)
    scores = score_tokens(hidden, head, torch.zeros(0, dtype=torch.long), torch.zeros(0, 2, dtype=torch.long))
    assert scores.chosen.shape == scores.entropy.shape == (0,) and scores.topk.shape == (0, 2)


def test_rows_come_in_chunks_over_the_shared_vocabulary():
    hidden, head = torch.randn(10, 8), torch.randn(31, 8)
    pieces = list(logprob_rows(hidden, head, vocab=20, chunk=4))
    assert [len(piece) for piece in pieces] == [4, 4, 2]
    torch.testing.assert_close(torch.cat(pieces), (hidden @ head[:20].T).log_softmax(-1))


def test_the_precision_of_products_is_given_back():
    backend: Any = torch.backends.mkldnn
    matmul = backend.matmul
    before = matmul.fp32_precision
    with products_of(torch.bfloat16):
        assert matmul.fp32_precision == "bf16"
    assert matmul.fp32_precision == before
