"""Weights of tokens, what they multiply and what they leave alone, and the way of a packed batch through all of it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from common.schema import Rollout
from tests.trainer import build
from tests.trainer.states import expected_gradient, gradient, kl, tables, tokens_of
from trainer import objectives
from trainer.batch import pack
from trainer.config import OpdConfig
from trainer.model import load_sharded
from trainer.objectives import LEAST_WEIGHT, Tokens, token_loss
from trainer.run import rules_of
from trainer.step import train_step

OBJECTIVES = ["paper", "importance", "proximal", "topk"]


def weighing(**columns: Tensor) -> Tokens:
    return tokens_of(*tables())._replace(**columns)


def test_the_entropy_weight_rises_from_the_least_to_one():
    entropy = torch.tensor([0.0, 1e-6, 0.5, torch.log(torch.tensor(2.0)), 11.9])
    weight = objectives.entropy_weight(weighing(entropy=entropy))
    assert weight[0] == LEAST_WEIGHT and (weight.diff() > 0).all() and 0.99 < weight[-1] < 1
    assert weight[3].item() == pytest.approx((1 + LEAST_WEIGHT) / 2)  # two equal choices


def test_the_position_weight_falls_from_one_and_stays_above_the_least():
    weight = objectives.position_weight(weighing(position=torch.arange(4000), length=torch.full((4000,), 4000)))
    assert weight[0] == 1 and (weight.diff() < 0).all() and weight[-1] > LEAST_WEIGHT
    assert weight[2000].item() == pytest.approx((1 + LEAST_WEIGHT) / 2)


def test_the_only_token_of_a_completion_has_the_full_position_weight():
    weight = objectives.position_weight(weighing(position=torch.tensor([0]), length=torch.tensor([1])))
    assert weight.tolist() == [1.0]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["entropy", "position"])
def test_weights_multiply_the_loss_and_leave_the_anchor_alone(objective, name):
    student, teacher, rollout = tables()
    tokens = tokens_of(student, teacher, rollout, k=3)
    loss = partial(token_loss, objective, tokens, max_importance_ratio=2.0)
    weight = {"entropy": objectives.entropy_weight, "position": objectives.position_weight}[name](tokens)
    assert weight.min() < 0.8, "the weights must differ for this test to mean anything"
    torch.testing.assert_close(loss(token_weights=name), weight * loss())
    anchored = loss(token_weights=name, anchor_weight=0.5)
    torch.testing.assert_close(anchored, weight * loss() + 0.5 * objectives.anchor(tokens, 2.0))


def test_no_gradient_flows_through_the_entropy_weight():
    """A student could otherwise lower its loss by being sure of itself."""
    student, teacher, rollout = tables()
    weight = objectives.entropy_weight(tokens_of(student, teacher, rollout))
    weighted = partial(token_loss, "paper", max_importance_ratio=2.0, token_weights="entropy")
    plain = gradient(lambda s: objectives.paper(tokens_of(s, teacher, rollout)), student)
    got = gradient(lambda s: weighted(tokens_of(s, teacher, rollout)), student)
    torch.testing.assert_close(got, weight[:, None] * plain)


def test_the_entropy_weight_keeps_the_direction_of_the_expected_gradient():
    student, teacher, rollout = tables()
    loss = partial(token_loss, "importance", max_importance_ratio=float("inf"), token_weights="entropy")
    weight = objectives.entropy_weight(tokens_of(student, teacher, rollout))
    exact = weight[:, None] * gradient(lambda s: kl(s, teacher), student)
    torch.testing.assert_close(expected_gradient(loss, student, teacher, rollout), exact)


@pytest.mark.parametrize("weights", ["none", "entropy", "position"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_token_sees_another(objective, weights):
    tokens = tokens_of(*tables(), k=3)
    loss = partial(token_loss, objective, max_importance_ratio=2.0, token_weights=weights, anchor_weight=0.1)
    apart = [loss(Tokens(*(column[row] for column in tokens))) for row in (slice(0, 2), slice(2, 2), slice(2, 5))]
    assert torch.equal(torch.cat(apart), loss(tokens))


def odd_rows(example) -> list[Rollout]:
    """A truncated completion, one of a single token, and one that ends as it should."""
    truncated, short, stopped = example.rows[:3]
    columns = ("completion_ids", "rollout_logprobs", "teacher_logprobs", "topk_ids", "topk_logprobs")
    short = replace(short, **{name: getattr(short, name)[:1] for name in columns})
    ids = stopped.completion_ids.copy()
    ids[-1] = build.EOS
    assert build.EOS not in truncated.completion_ids
    return [truncated, short, replace(stopped, completion_ids=ids, finish_reason="stop")]


def gradient_of_rows(model: Any, rows: Sequence[Rollout], config: OpdConfig) -> dict[str, Tensor]:
    """From separate forward passes, each row's log-probs taken from all of its logits."""
    loss = rules_of(config).loss
    total = sum(len(row.completion_ids) for row in rows)
    for row in rows:
        ids, prompt = torch.from_numpy(row.completion_ids).long(), torch.from_numpy(row.prompt_ids).long()
        logps = model(torch.cat([prompt, ids])[None], use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        best = torch.from_numpy(row.topk_ids).long()
        tokens = Tokens(
            student=logps.gather(-1, ids[:, None])[:, 0],
            teacher=torch.from_numpy(row.teacher_logprobs),
            rollout=torch.from_numpy(row.rollout_logprobs),
            ids=ids,
            entropy=-(logps.exp() * logps).sum(-1).detach(),
            position=torch.arange(len(ids)),
            length=torch.tensor([len(ids)] * len(ids)),
            topk_ids=best,
            topk_teacher=torch.from_numpy(row.topk_logprobs),
            topk_student=logps.gather(-1, best),
        )
        losses = loss(tokens)
        (losses.sum() / total if config.loss_mean == "token" else losses.mean() / len(rows)).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("loss_mean", ["token", "rollout"])
@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "importance", "token_weights": "position", "anchor": 0.3},
        {"objective": "proximal", "token_weights": "entropy", "clip_advantage": 0.05},
        {"objective": "topk", "kl": "mixed", "token_weights": "position"},
    ],
    ids=lambda settings: settings["objective"],
)
def test_truncated_and_single_token_completions_train_as_they_would_alone(example, alone, settings, loss_mean):
    config = OpdConfig(model="", data="", output="", clip=float("inf"), logits_chunk=5, loss_mean=loss_mean, **settings)
    rows = odd_rows(example)
    model = load_sharded(example.student, alone, compute="float32", attention="sdpa", checkpoint_activations=False)
    batches = [pack(rows[:2], topk=build.TOPK), pack(rows[2:], topk=build.TOPK), pack([], topk=build.TOPK)]
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), batches, rules_of(config), alone)
    expected = gradient_of_rows(build.open_model(example.student), rows, config)
    for name, weight in model.named_parameters():
        got = weight.grad.full_tensor()  # type: ignore[union-attr]
        torch.testing.assert_close(got, expected[name], atol=2e-6, rtol=1e-4, msg=name)
