"""The objectives: each turns what student, teacher and rollout policy say about every token into a loss per token.

Each function returns (tokens,) float32; how tokens are averaged is the step's business (`step.py`). `Tokens` carries
all that a dataset stores, so a new objective is one more function and one more line in `token_loss`.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Objective = Literal["paper", "importance", "topk"]

LARGEST_BUCKET_LOGMASS = -1e-6
"""Upper bound of the log of the mass outside the tail. Float32 log-probs that sum to one do so within about 1e-7 x
k, so a tail below 1e-6 is rounding noise; bounding it keeps its logarithm above -13.9 and passes no gradient through.
"""


class Tokens(NamedTuple):
    """The completion tokens of a packed batch; log-probs in nats at temperature 1, but `rollout` as it was sampled."""

    student: Tensor  # (tokens,) log pi_theta(token), differentiable
    teacher: Tensor  # (tokens,) log pi_T(token)
    rollout: Tensor  # (tokens,) log pi_rollout(token)
    ids: Tensor  # (tokens,) the sampled token
    topk_ids: Tensor  # (tokens, k) the teacher's k most likely; k = 0 where the dataset has none
    topk_teacher: Tensor  # (tokens, k)
    topk_student: Tensor  # (tokens, k) differentiable


def token_loss(objective: Objective, tokens: Tokens, *, max_importance_ratio: float) -> Tensor:
    """The loss of each token, (tokens,), under the named objective."""
    match objective:
        case "paper":
            return paper(tokens)
        case "importance":
            return importance(tokens, max_importance_ratio)
        case "topk":
            return topk(tokens)


def imitation(tokens: Tokens) -> Tensor:
    """-log pi_theta(a_t|s_t): the supervised loss, where the tokens are the teacher's."""
    return -tokens.student


def advantage(tokens: Tokens) -> Tensor:
    """A_t = log pi_T(a_t|s_t) - log pi_theta(a_t|s_t), detached. (tokens,) nats. arXiv 2604.13010, eq. of stage 2."""
    return tokens.teacher - tokens.student.detach()


def paper(tokens: Tokens) -> Tensor:
    """-A_t log pi_theta(a_t|s_t), the loss of arXiv 2604.13010 to the letter.

    After the first step the tokens are no longer the student's own, so its expectation is no longer the KL gradient.
    """
    return -advantage(tokens) * tokens.student


def importance(tokens: Tokens, max_ratio: float) -> Tensor:
    """-w_t A_t log pi_theta(a_t|s_t) with w_t = min(pi_theta / pi_rollout, max_ratio), detached.

    E_{a ~ pi_rollout}[w_t x gradient] is the exact gradient of KL(pi_theta || pi_T) at the stored state, however stale
    the rollout, wherever the bound does not bite. (Truncated importance sampling, Ionides 2008, on the token level.)
    """
    ratio = importance_ratio(tokens).clamp(max=max_ratio)
    return -ratio * advantage(tokens) * tokens.student


def importance_ratio(tokens: Tokens) -> Tensor:
    """pi_theta(a_t|s_t) / pi_rollout(a_t|s_t), detached and unbounded. (tokens,)"""
    return (tokens.student.detach() - tokens.rollout).exp()


def topk(tokens: Tokens) -> Tensor:
    """Reverse KL(pi_theta || pi_T) at each state over the buckets {teacher's top-k}, {sampled token}, {everything
    else}.

        sum_i p_i (log p_i - log q_i) + p_rest (log p_rest - log q_rest),  p student, q teacher

    Differentiable through every p. By the log-sum inequality it is a lower bound of the full KL, equal to it at k =
    vocab. The rest bucket is what stops the student from hiding mass outside the top-k, so it is never left out.
    """
    known = (tokens.topk_ids == tokens.ids[:, None]).any(-1, keepdim=True)  # (tokens, 1)
    student = torch.cat([tokens.topk_student, _hide(tokens.student[:, None], known)], -1)  # (tokens, k + 1)
    teacher = torch.cat([tokens.topk_teacher, _hide(tokens.teacher[:, None], known)], -1)
    student = torch.cat([student, _log_rest(student)], -1)  # (tokens, k + 2)
    teacher = torch.cat([teacher, _log_rest(teacher)], -1)
    empty = student.isneginf()
    # A hidden bucket must give 0, not -inf - -inf, and no NaN in the gradient: replace it before the subtraction.
    difference = student.masked_fill(empty, 0.0) - teacher.masked_fill(empty, 0.0)
    return (student.exp() * difference).sum(-1)


def _hide(logps: Tensor, hidden: Tensor) -> Tensor:
    return logps.masked_fill(hidden, float("-inf"))


def _log_rest(logps: Tensor) -> Tensor:
    """log(1 - sum exp(logps)), (tokens, 1), by log1mexp of the log-mass (Maechler 2012), bounded as said above."""
    mass = logps.logsumexp(-1, keepdim=True).clamp(max=LARGEST_BUCKET_LOGMASS)
    return torch.where(mass > -0.6931472, (-torch.expm1(mass)).log(), torch.log1p(-mass.exp()))
