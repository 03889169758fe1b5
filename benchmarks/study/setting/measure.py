"""What a student is worth: how often it is right, and how far it is from its teacher and from where it began.

All on held-out questions, each answered once by the student at temperature 1. Both distances are exact KL divergences
over the whole vocabulary at the states of these answers, so that chance decides only which states are seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.study.setting.networks import IDS, MAX_TOKENS, decode, encode
from benchmarks.study.setting.task import END, Question, is_right
from common.schema import Rollout
from trainer.batch import Batch, pack
from trainer.evaluate import reverse_kl

PACK = 64
"""Answers in one forward pass of the distances."""


@dataclass(frozen=True)
class Figures:
    """Of one student. Distances are means per token, in nats."""

    accuracy: float
    reverse_kl: float
    """KL(student || teacher)."""
    drift: float
    """KL(student || SFT model)."""
    tokens: float
    """Mean length of an answer."""


@torch.no_grad()
def measure(
    student: PreTrainedModel, teacher: PreTrainedModel, start: PreTrainedModel, asked: Sequence[Question], seed: int
) -> Figures:
    """Figures of `student`; `start` is the model its distillation began from."""
    answered = list(answers(student, asked, seed))
    right = [is_right(decode(ids), question.answer) for question, ids in answered]
    sums, tokens = np.zeros(2), 0
    for first in range(0, len(answered), PACK):
        batch = _batch(answered[first : first + PACK])
        sums += [float(reverse_kl(student, other, batch, 4096).sum(dtype=torch.double)) for other in (teacher, start)]
        tokens += len(batch.ids)
    to_teacher, to_start = sums / tokens
    return Figures(float(np.mean(right)), float(to_teacher), float(to_start), tokens / len(answered))


@torch.no_grad()
def entropy(model: PreTrainedModel, asked: Sequence[Question], seed: int) -> float:
    """Mean entropy of a model's own tokens, in nats: how soft it is."""
    total, tokens = 0.0, 0
    for _, ids, logps in _sampled(model, asked, seed):
        total -= sum(logps)
        tokens += len(ids)
    return total / tokens


def answers(model: PreTrainedModel, asked: Sequence[Question], seed: int) -> Iterator[tuple[Question, list[int]]]:
    """One answer to each question, sampled from the model's own distribution."""
    for question, ids, _ in _sampled(model, asked, seed):
        yield question, ids


def _sampled(
    model: PreTrainedModel, asked: Sequence[Question], seed: int
) -> Iterator[tuple[Question, list[int], list[float]]]:
    """With the log-prob of each token. Prompts of one length go together, so none is padded."""
    generator = torch.Generator().manual_seed(seed)
    for _, group in groupby(sorted(asked, key=lambda question: len(question.prompt)), lambda q: len(q.prompt)):
        questions = list(group)
        ids, logps = _sample(model, torch.tensor([encode(question.prompt) for question in questions]), generator)
        for question, row, row_logps in zip(questions, ids.tolist(), logps.tolist(), strict=True):
            length = row.index(IDS[END]) + 1 if IDS[END] in row else len(row)
            yield question, row[:length], row_logps[:length]


@torch.no_grad()
def _sample(model: PreTrainedModel, prompts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(rows, tokens) ids and log-probs; what follows the end of an answer means nothing."""
    cache, fed = DynamicCache(), prompts
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    ids, logps = list[Tensor](), list[Tensor]()
    while len(ids) < MAX_TOKENS and not ended.all():
        logits = model(fed, past_key_values=cache, use_cache=True).logits[:, -1].float().log_softmax(-1)
        fed = torch.multinomial(logits.exp(), 1, generator=generator)
        ids.append(fed)
        logps.append(logits.gather(1, fed))
        ended |= fed[:, 0] == IDS[END]
    return torch.cat(ids, 1), torch.cat(logps, 1)


def _batch(answered: Sequence[tuple[Question, list[int]]]) -> Batch:
    """As the trainer packs rollouts; log-probs that nobody reads are zeros."""
    return pack(
        [
            Rollout(
                uid=question.prompt,
                prompt_id=question.prompt,
                sample_idx=0,
                prompt_ids=np.array(encode(question.prompt), np.int32),
                completion_ids=np.array(ids, np.int32),
                rollout_logprobs=np.zeros(len(ids), np.float32),
                finish_reason="stop",
            )
            for question, ids in answered
        ]
    )
