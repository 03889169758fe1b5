"""Packing is only right if rows cannot see one another, and nothing in transformers says so when they can."""

import pytest
import torch

from tests.trainer import build
from trainer.batch import pack
from trainer.model import hidden_states


@pytest.fixture(scope="module")
def model(example):
    return build.open_model(example.student)


def chosen(model, batch, logits) -> torch.Tensor:
    return logits[batch.predictors].log_softmax(-1).gather(-1, batch.ids[:, None])[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_score_as_rows_alone(example, model, attention):
    rows = example.rows[:7]
    model.set_attn_implementation(attention)
    batch = pack(rows)
    packed = chosen(model, batch, model.lm_head(hidden_states(model, batch.input_ids, batch.position_ids)))
    alone = [
        build.logprob_table(model, row).gather(-1, torch.from_numpy(row.completion_ids).long()[:, None])[:, 0]
        for row in rows
    ]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_mask_a_cache_or_missing_positions_would_be_seen(example, model):
    batch = pack(example.rows[:7])
    right = chosen(model, batch, model.lm_head(hidden_states(model, batch.input_ids, batch.position_ids)))
    wrong = {
        "mask": {"position_ids": batch.position_ids, "attention_mask": torch.ones_like(batch.input_ids)},
        "cache": {"position_ids": batch.position_ids, "use_cache": True},
        "positions": {"use_cache": False},
    }
    for name, arguments in wrong.items():
        if name == "mask":
            arguments["use_cache"] = False
        logits = model(batch.input_ids, **arguments).logits[0]
        assert (chosen(model, batch, logits) - right).abs().max() > 0.1, name


@torch.no_grad()
def test_the_stored_rollout_logprobs_come_back_in_place(example, model):
    batch = pack(example.rows)
    scored = chosen(model, batch, model.lm_head(hidden_states(model, batch.input_ids, batch.position_ids)))
    torch.testing.assert_close(scored, batch.rollout, atol=1e-4, rtol=1e-4)


def test_columns_keep_their_rows(example):
    batch = pack(example.rows[:5], topk=3)
    assert batch.topk_ids.shape == batch.topk_teacher.shape == (len(batch.ids), 3)
    for row, teacher, ids in zip(
        example.rows, batch.per_row(batch.teacher), batch.per_row(batch.topk_ids[:, 0]), strict=False
    ):
        assert teacher.tolist() == row.teacher_logprobs.tolist()
        assert ids.tolist() == row.topk_ids[:, 0].tolist()
    assert batch.input_ids[0, batch.predictors + 1].tolist() == batch.ids.tolist()


def test_the_empty_batch_is_one_idle_token():
    batch = pack([], topk=3)
    assert batch.input_ids.shape == batch.position_ids.shape == (1, 1)
    assert len(batch.ids) == len(batch.rollout) == 0
    assert batch.topk_ids.shape == batch.topk_teacher.shape == (0, 3)


def test_an_unscored_row_has_no_teacher_to_use_by_mistake(example):
    row = type(example.rows[0])(**{**vars(example.rows[0]), "teacher_logprobs": None})
    assert pack([row]).teacher.isnan().all()
