"""The objectives: each turns what student, teacher and rollout policy say about every token into a loss per token.

Each is a pure function of `Tokens` that returns (tokens,) float32 and lets no token see another, so that the head may
call it chunk by chunk. How tokens are averaged is the step's business (`step.py`).

Three of them are policy gradients, -w_t A_t log pi_theta(a_t|s_t) with w_t and A_t detached; their value means little,
their gradient is what they are for. They differ in two choices:

    paper        w_t = 1                                  A_t = log pi_T - log pi_theta
    importance   w_t = min(pi_theta / pi_rollout, bound)  A_t = log pi_T - log pi_theta
    proximal     w_t = 1                                  A_t = log(alpha pi_T + (1 - alpha) pi_theta) - log pi_theta

`clip` bounds A_t on both sides. `topk` is a KL divergence, differentiated as it stands.

A token the teacher gives probability 0, which the row checks let into no dataset: the KL that `paper`, `importance` and
the reverse KL of `topk` descend is infinite, and their loss is not finite either, so that the step refuses the row by
its name. A clipped advantage, `proximal` with alpha < 1 and the forward KL are finite there.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Objective = Literal["paper", "importance", "proximal", "topk"]
Divergence = Literal["reverse", "forward", "mixed"]
TokenWeights = Literal["none", "entropy", "position"]

LARGEST_BUCKET_LOGMASS = -1e-6
"""Upper bound of the log of the mass outside the tail. Float32 log-probs that sum to one do so within about 1e-7 x
k, so a tail below 1e-6 is rounding noise; bounding it keeps its logarithm above -13.9 and passes no gradient through.
"""
LEAST_WEIGHT = 0.1
"""What a token of no entropy, or at the far end of its completion, still counts. Not 0: tokens on which the student is
sure and wrong have hardly any entropy and teach much (arXiv 2604.14084)."""


class Tokens(NamedTuple):
    """The completion tokens of a packed batch; log-probs in nats at temperature 1, but `rollout` as it was sampled."""

    student: Tensor  # (tokens,) log pi_theta(token), differentiable
    teacher: Tensor  # (tokens,) log pi_T(token)
    rollout: Tensor  # (tokens,) log pi_rollout(token)
    ids: Tensor  # (tokens,) the sampled token
    entropy: Tensor  # (tokens,) nats, of the student's whole next-token distribution, detached
    position: Tensor  # (tokens,) int64, from 0 in its completion
    length: Tensor  # (tokens,) int64, tokens of its completion
    topk_ids: Tensor  # (tokens, k) most likely to teacher or student; k = 0 where the dataset has none
    topk_teacher: Tensor  # (tokens, k)
    topk_student: Tensor  # (tokens, k) differentiable


def token_loss(
    objective: Objective,
    tokens: Tokens,
    *,
    max_importance_ratio: float,
    clip_advantage: float = math.inf,
    proximal_alpha: float = 0.5,
    kl: Divergence = "reverse",
    kl_forward_share: float = 0.5,
    token_weights: TokenWeights = "none",
    anchor_weight: float = 0.0,
) -> Tensor:
    """weight_t x objective_t + anchor_weight x anchor_t of each token, (tokens,).

    The weights leave the divisor of the mean alone: a batch of tokens that weigh little takes a small step. They leave
    the anchor alone too, which is to hold the student where little is to be learned.
    """
    match objective:
        case "paper":
            loss = paper(tokens, clip_advantage)
        case "importance":
            loss = importance(tokens, max_importance_ratio, clip_advantage)
        case "proximal":
            loss = proximal(tokens, proximal_alpha, clip_advantage)
        case "topk":
            loss = topk(tokens, kl, kl_forward_share)
    match token_weights:
        case "entropy":
            loss = entropy_weight(tokens) * loss
        case "position":
            loss = position_weight(tokens) * loss
    return loss + anchor_weight * anchor(tokens, max_importance_ratio) if anchor_weight else loss


def imitation(tokens: Tokens) -> Tensor:
    """-log pi_theta(a_t|s_t): the supervised loss, where the tokens are the teacher's."""
    return -tokens.student


def paper(tokens: Tokens, clip: float = math.inf) -> Tensor:
    """-A_t log pi_theta(a_t|s_t), the loss of arXiv 2604.13010 to the letter.

    After the first step the tokens are no longer the student's own, so its expectation is no longer the KL gradient.
    """
    return -advantage(tokens).clamp(-clip, clip) * tokens.student


def importance(tokens: Tokens, max_ratio: float, clip: float = math.inf) -> Tensor:
    """-w_t A_t log pi_theta(a_t|s_t) with w_t = min(pi_theta / pi_rollout, max_ratio), detached.

    E_{a ~ pi_rollout}[gradient] is the exact gradient of KL(pi_theta || pi_T) at the stored state, however stale the
    rollout, wherever neither bound bites. (Truncated importance sampling, Ionides 2008, on the token level.)
    """
    ratio = importance_ratio(tokens).clamp(max=max_ratio)
    return -ratio * advantage(tokens).clamp(-clip, clip) * tokens.student


def proximal(tokens: Tokens, alpha: float, clip: float = math.inf) -> Tensor:
    """-A_t log pi_theta(a_t|s_t) with A_t = log(alpha pi_T + (1 - alpha) pi_theta) - log pi_theta.

    The teacher of a small step: a mixture of teacher and student, held fixed. From the sampled token's two log-probs
    alone A_t is bounded below by log(1 - alpha), where the paper's falls without end on a token that the teacher would
    never say. alpha = 1 is `paper`. (The proximal teacher of arXiv 2607.04751, without its returns.)
    """
    return -proximal_advantage(tokens, alpha).clamp(-clip, clip) * tokens.student


def advantage(tokens: Tokens) -> Tensor:
    """A_t = log pi_T(a_t|s_t) - log pi_theta(a_t|s_t), detached. (tokens,) nats. arXiv 2604.13010, eq. of stage 2."""
    return tokens.teacher - tokens.student.detach()


def proximal_advantage(tokens: Tokens, alpha: float) -> Tensor:
    """log(alpha pi_T + (1 - alpha) pi_theta) - log pi_theta, detached, in the form log(alpha exp(A_t) + 1 - alpha)."""
    plain = advantage(tokens)
    return torch.logaddexp(plain + math.log(alpha), torch.log1p(torch.full_like(plain, -alpha)))


def importance_ratio(tokens: Tokens) -> Tensor:
    """pi_theta(a_t|s_t) / pi_rollout(a_t|s_t), detached and unbounded. (tokens,)"""
    return (tokens.student.detach() - tokens.rollout).exp()


def anchor(tokens: Tokens, max_ratio: float) -> Tensor:
    """w_t (log pi_theta - log pi_rollout) log pi_theta, all but the last factor detached, w_t bounded as above.

    Its gradient estimates that of KL(pi_theta || pi_rollout) at the stored state, from the stored log-probs alone:

        grad KL = sum_a pi_theta (log pi_theta - log pi_rollout) grad log pi_theta + sum_a grad pi_theta
                = E_{a ~ pi_rollout}[w_t log w_t grad log pi_theta],    w_t = pi_theta / pi_rollout

    as the last sum is the gradient of 1. So it is exact in expectation at any theta where the bound does not bite, and
    a bounded weight only weakens a pull that still grows with the drift. In the first round pi_rollout is the SFT
    model; of rollouts at another temperature it is the SFT model at that temperature.
    """
    ratio = importance_ratio(tokens).clamp(max=max_ratio)
    return ratio * (tokens.student.detach() - tokens.rollout) * tokens.student


def entropy_weight(tokens: Tokens) -> Tensor:
    """From LEAST_WEIGHT for a student that is sure up to 1: LEAST_WEIGHT + (1 - LEAST_WEIGHT) (1 - exp(-H_t)).

    exp(H_t) counts the tokens the student wavers between, so two equal choices stand half way. That tokens of high
    entropy carry most of the signal is from arXiv 2604.14084, which keeps the upper half of a batch; this form is ours,
    as it needs no other token. The weight knows the state and not the sampled token, so expectations over tokens keep
    their direction at each state.
    """
    return LEAST_WEIGHT - (1 - LEAST_WEIGHT) * torch.expm1(-tokens.entropy)


def position_weight(tokens: Tokens) -> Tensor:
    """From 1 at the first token down towards LEAST_WEIGHT: 1 - (1 - LEAST_WEIGHT) position / length.

    The first 30% of a completion teach about as much as all of it and the last 30% little (arXiv 2606.22600); the
    straight line is ours. It knows the length, so at a state where the rollout could have ended, EOS weighs less than
    any token that goes on.
    """
    return 1 - (1 - LEAST_WEIGHT) * tokens.position / tokens.length


def topk(tokens: Tokens, kl: Divergence = "reverse", forward_share: float = 0.5) -> Tensor:
    """KL at each state over the buckets {each of the teacher's top-k}, {sampled token}, {everything else}.

        reverse  KL(pi_theta || pi_T) = sum_i p_i (log p_i - log q_i)         p student, q teacher
        forward  KL(pi_T || pi_theta) = sum_i q_i (log q_i - log p_i)
        mixed    (1 - forward_share) reverse + forward_share forward          not a Jensen-Shannon divergence

    Differentiable through every p. By the log-sum inequality each is a lower bound of the full KL that grows with k
    and equals it at k = vocab. The rest bucket is what stops the student from hiding mass outside the top-k, so it is
    never left out.
    """
    known = (tokens.topk_ids == tokens.ids[:, None]).any(-1, keepdim=True)  # (tokens, 1)
    student = _buckets(tokens.topk_student, tokens.student, known)
    teacher = _buckets(tokens.topk_teacher, tokens.teacher, known)
    match kl:
        case "reverse":
            return _kl(student, teacher)
        case "forward":
            return _kl(teacher, student)
        case "mixed":
            return torch.lerp(_kl(student, teacher), _kl(teacher, student), forward_share)


def _buckets(topk: Tensor, sampled: Tensor, known: Tensor) -> Tensor:
    """Log-masses of all buckets, (tokens, k + 2); the sampled token's is empty where the top-k `known` it already."""
    named = torch.cat([topk, sampled[:, None].masked_fill(known, -math.inf)], -1)
    return torch.cat([named, _log_rest(named)], -1)


def _kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """sum_i exp(ours_i) (ours_i - theirs_i) over the last dimension, with 0 log 0 = 0."""
    empty = ours.isneginf()
    # An empty bucket must give 0, not -inf - -inf, and no NaN in the gradient: replace it before the subtraction.
    difference = ours.masked_fill(empty, 0.0) - theirs.masked_fill(empty, 0.0)
    return (ours.exp() * difference).sum(-1)


def _log_rest(logps: Tensor) -> Tensor:
    """log(1 - sum exp(logps)), (tokens, 1), by log1mexp of the log-mass (Maechler 2012), bounded as said above."""
    mass = logps.logsumexp(-1, keepdim=True).clamp(max=LARGEST_BUCKET_LOGMASS)
    return torch.where(mass > -0.6931472, (-torch.expm1(mass)).log(), torch.log1p(-mass.exp()))
