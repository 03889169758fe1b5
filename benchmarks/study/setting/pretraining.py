"""The networks before any distillation, trained from nothing on answers written by the rules of the task.

The teachers begin as one network that learns answers in any order; A and B are it after a while on answers of one habit
each. So both know what to make of an answer in the other's order, as language models do, but would not write it so. The
student's base model has learned answers in any order too, but then noise was laid over its weights, much as pruning or
quantising would: it knows how, and is often wrong. Without that, SFT alone makes it as good as its teacher.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import torch
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from transformers import LlamaForCausalLM

from benchmarks.study.setting.networks import CONTEXT, STUDENT, TEACHER, encode, save
from benchmarks.study.setting.task import FEWEST, MOST, Habit, Question, chain, question
from common.errors import LopdError
from trainer.schedule import lr

ROWS = 128
EASY, EASY_STEPS = (1, 3), 150
"""How many numbers the first questions have, and for how many steps."""
WARMUP = 80
WINDOW, LEARNED = 25, 0.66
"""Nats per token, mean of so many steps; chance alone makes 0.60 of any order, and who cannot add has 1.1."""
MOST_STEPS = 3000
IGNORED = -100
HABITS: dict[str, Habit] = {"a": "up", "b": "down"}


class NotLearned(LopdError):
    """A network did not come to understand the task."""


def learn(model: LlamaForCausalLM, *, peak: float, seed: int, told: Callable[[int, float], None]) -> None:
    """Train `model` from nothing until it knows how to answer in any order.

    How to add is learned all at once, and on whole questions alone at a step that the last bit of a sum decides, if at
    all. So the first questions are short, and the end is not a number of steps but a loss.

    Args:
        told: takes step and loss, in nats per token.

    Raises:
        NotLearned: it has not after MOST_STEPS.
    """
    draw, optimizer, losses = random.Random(seed), _optimizer(model), list[float]()
    while len(losses) < EASY_STEPS + WINDOW or mean(losses[-WINDOW:]) > LEARNED:
        if len(losses) == MOST_STEPS:
            raise NotLearned(f"a network's loss is {mean(losses[-WINDOW:]):.2f} after {MOST_STEPS} steps")
        step = len(losses)
        fewest, most = EASY if step < EASY_STEPS else (FEWEST, MOST)
        asked = [question(draw, fewest, most) for _ in range(ROWS)]
        losses.append(_step(model, optimizer, asked, "any", draw, peak * min(1, (step + 1) / WARMUP)))
        told(step + 1, losses[-1])


def practise(
    model: LlamaForCausalLM, habit: Habit, *, steps: int, peak: float, seed: int, told: Callable[[int, float], None]
) -> None:
    """Train `model`, which knows how to answer, on answers of this habit, at a rate that falls to nothing."""
    draw, optimizer = random.Random(seed), _optimizer(model)
    for step in range(steps):
        asked = [question(draw) for _ in range(ROWS)]
        rate = lr(step, peak=peak, schedule="cosine", warmup=steps // 10, total=steps)
        told(step + 1, _step(model, optimizer, asked, habit, draw, rate))


def _optimizer(model: LlamaForCausalLM) -> AdamW:
    return AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)


def _step(
    model: LlamaForCausalLM, optimizer: AdamW, asked: Sequence[Question], habit: Habit, draw: random.Random, rate: float
) -> float:
    """One step on answers of this habit; the prompt's tokens are not graded. Gives the loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    ids, targets = _batch(asked, habit, draw)
    loss = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _batch(asked: Sequence[Question], habit: Habit, draw: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.zeros(len(asked), CONTEXT, dtype=torch.long)
    targets = torch.full((len(asked), CONTEXT), IGNORED)
    longest = 0
    for row, one in enumerate(asked):
        prompt, answer = encode(one.prompt), encode(chain(one, habit, draw))
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        targets[row, len(prompt) : end] = torch.tensor(answer)
        longest = max(longest, end)
    return ids[:, :longest], targets[:, :longest]


def make_teachers(root: Path, steps: tuple[int, int], told: Callable[[int, float], None]) -> None:
    """Both teachers below `root`; `steps` of practice in any order and then in one."""
    base = TEACHER.build(seed=0)
    learn(base, peak=2e-3, seed=1, told=told)
    practise(base, "any", steps=steps[0], peak=2e-3, seed=1, told=told)
    for number, (name, habit) in enumerate(HABITS.items()):
        model = TEACHER.build(seed=0)
        model.load_state_dict(base.state_dict())
        practise(model, habit, steps=steps[1], peak=1e-3, seed=2 + number, told=told)
        save(model, root / name)


def make_base(folder: Path, steps: int, noise: float, told: Callable[[int, float], None]) -> None:
    """The model that students are fine-tuned from.

    Args:
        steps: of practice.
        noise: added to the weights in the end, as a share of each matrix's own standard deviation.
    """
    base = STUDENT.build(seed=4)
    learn(base, peak=3e-3, seed=5, told=told)
    practise(base, "any", steps=steps, peak=3e-3, seed=5, told=told)
    draw = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for weight in base.parameters():
            if weight.ndim == 2:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=draw)
    save(base, folder)
