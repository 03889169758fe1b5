"""Where probabilities vanish: a token the teacher never says, a certain one, and log-probs as low as float32 bears."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.errors import DataError
from tests.trainer.states import gradient, score_function, tables, tokens_of
from trainer import objectives
from trainer.batch import pack
from trainer.config import OpdConfig
from trainer.model import load_sharded
from trainer.objectives import Objective, Tokens, token_loss
from trainer.run import rules_of
from trainer.step import train_step

BOUNDED = partial(token_loss, max_importance_ratio=2.0, anchor_weight=0.5)
POLICY_GRADIENTS: list[Objective] = ["paper", "importance", "proximal"]
VARIANTS = [
    *[(name, {"clip_advantage": clip}) for name in POLICY_GRADIENTS for clip in (math.inf, 2.0)],
    *[("topk", {"kl": kl}) for kl in ("reverse", "forward", "mixed")],
    *[("importance", {"token_weights": weights}) for weights in ("entropy", "position")],
    ("proximal", {"proximal_alpha": 1.0}),
]


def logprobs(*shape: int) -> st.SearchStrategy[np.ndarray]:
    """Down to -100, exactly 0, and the little above 0 that the row checks let pass."""
    return arrays(np.float32, shape, elements=st.floats(-100, 0, width=32) | st.sampled_from([-100.0, 0.0, 1e-4]))


@st.composite
def extreme_tokens(draw: st.DrawFn) -> Tokens:
    """Columns that need not belong together: what a damaged dataset could hold."""
    n, k = 4, 3
    student, topk_student = (torch.from_numpy(draw(logprobs(*shape))) for shape in ((n,), (n, k)))
    return Tokens(
        student=student.clamp(max=0.0).requires_grad_(),
        teacher=torch.from_numpy(draw(logprobs(n))),
        rollout=torch.from_numpy(draw(logprobs(n))),
        ids=torch.tensor(draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))),
        entropy=torch.from_numpy(draw(arrays(np.float32, n, elements=st.floats(0, 12, width=32)))),
        position=torch.arange(n),
        length=torch.full((n,), n),
        topk_ids=torch.arange(k).expand(n, k),
        topk_teacher=torch.from_numpy(draw(logprobs(n, k))),
        topk_student=topk_student.clamp(max=0.0).requires_grad_(),
    )


@pytest.mark.parametrize(("objective", "options"), VARIANTS)
@settings(max_examples=40, deadline=None)
@given(tokens=extreme_tokens())
def test_losses_and_gradients_are_finite_for_any_finite_columns(objective, options, tokens):
    losses = BOUNDED(objective, tokens, **options)
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    inputs = (tokens.student, tokens.topk_student)
    for grad in torch.autograd.grad(losses.sum(), inputs, materialize_grads=True):
        assert grad.isfinite().all()


@pytest.mark.parametrize(("objective", "options"), VARIANTS)
@settings(max_examples=40, deadline=None)
@given(logits=st.tuples(*[arrays(np.float32, (5, 7), elements=st.floats(-100, 0, width=32))] * 3), k=st.integers(1, 7))
def test_gradients_reach_the_logits_finite(objective, options, logits, k):
    student, teacher, rollout = map(torch.from_numpy, logits)
    got = gradient(lambda s: BOUNDED(objective, tokens_of(s, teacher, rollout, k=k), **options), student)
    assert got.isfinite().all()


@pytest.mark.parametrize("kl", ["reverse", "forward", "mixed"])
@settings(max_examples=60, deadline=None)
@given(logits=st.tuples(*[arrays(np.float32, (5, 7), elements=st.floats(-100, 0, width=32))] * 3), k=st.integers(1, 7))
def test_the_kl_between_buckets_is_never_negative(kl, logits, k):
    tokens = tokens_of(*map(torch.from_numpy, logits), k=k)
    assert (objectives.topk(tokens, kl) > -3e-5).all()  # a tail lifted to 1e-6 costs at most 1e-6 x 13.8


def with_teacher(logp: float) -> Tokens:
    tokens = tokens_of(*tables())
    return tokens._replace(teacher=torch.full_like(tokens.teacher, logp))


@pytest.mark.parametrize("objective", ["paper", "importance"])
def test_a_token_the_teacher_never_says_stops_the_step_and_names_its_row(example, alone, objective):
    model = load_sharded(example.student, alone, compute="float32", attention="sdpa", checkpoint_activations=False)
    batch = pack(example.rows[:3])
    teacher = batch.teacher.masked_fill((batch.row == 1) & (batch.position == 0), -math.inf)
    rules = rules_of(OpdConfig(model="", data="", output="", objective=objective))
    with pytest.raises(DataError, match=f"loss of 1 rows is not finite.*{example.rows[1].uid}"):
        train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), [replace(batch, teacher=teacher)], rules, alone)


@pytest.mark.parametrize("objective", POLICY_GRADIENTS)
def test_clipped_a_token_the_teacher_never_says_is_pushed_down_by_the_bound(objective):
    student, teacher, rollout = tables()
    teacher[:, 3] = -math.inf
    ids = torch.full((5,), 3)
    loss = partial(token_loss, objective, max_importance_ratio=2.0, clip_advantage=0.5, proximal_alpha=0.9)
    ratio = objectives.importance_ratio(tokens_of(student, teacher, rollout, ids)).clamp(max=2.0)
    weight = ratio if objective == "importance" else torch.ones(5)
    got = gradient(lambda s: loss(tokens_of(s, teacher, rollout, ids)), student)
    torch.testing.assert_close(got, 0.5 * weight[:, None] * score_function(student, ids))


def test_proximal_pushes_a_token_the_teacher_never_says_down_by_its_floor():
    student, teacher, rollout = tables()
    teacher[:, 3] = -math.inf
    ids = torch.full((5,), 3)
    got = gradient(lambda s: objectives.proximal(tokens_of(s, teacher, rollout, ids), 0.8), student)
    torch.testing.assert_close(got, -math.log(0.2) * score_function(student, ids))


@pytest.mark.parametrize("objective", POLICY_GRADIENTS)
def test_a_token_the_teacher_is_certain_of_is_pulled_up(objective):
    tokens = with_teacher(0.0)
    student = tokens.student.clone().requires_grad_()
    loss = token_loss(objective, tokens._replace(student=student), max_importance_ratio=2.0)
    (by_student,) = torch.autograd.grad(loss.sum(), student)
    assert by_student.isfinite().all() and (by_student < 0).all()


def test_a_student_certain_of_a_certain_teachers_token_rests():
    tokens = with_teacher(0.0)._replace(student=torch.zeros(5, requires_grad=True))
    for objective in POLICY_GRADIENTS:
        loss = token_loss(objective, tokens, max_importance_ratio=2.0)
        assert torch.autograd.grad(loss.sum(), tokens.student)[0].abs().max() < 1e-6


@pytest.mark.parametrize("objective", [*POLICY_GRADIENTS, "topk"])
def test_an_unscored_dataset_cannot_pass_for_a_scored_one(objective):
    """Its teacher column is NaN, which no bound may turn into a number."""
    tokens = tokens_of(*tables(), k=1)._replace(teacher=torch.full((5,), math.nan), ids=torch.full((5,), 99))
    clip = math.inf if objective == "topk" else 1.0
    assert token_loss(objective, tokens, max_importance_ratio=2.0, clip_advantage=clip).isnan().all()
