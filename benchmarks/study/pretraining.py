"""The networks before any distillation, trained from nothing on answers written by the rules of the task.

The teachers begin as one network that learns answers in any order; A and B are it after a while on answers of one habit
each. So both know what to make of an answer in the other's order, as language models do, but would not write it so. The
student's base model has learned answers in any order too, but then noise was laid over its weights, much as pruning or
quantising would: it knows how, and is often wrong. Without that, SFT alone makes it as good as its teacher.
"""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from transformers import LlamaForCausalLM

from benchmarks.study.networks import CONTEXT, STUDENT, TEACHER, encode, save
from benchmarks.study.task import Habit, chain, question
from trainer.schedule import lr

ROWS = 128
IGNORED = -100
HABITS: dict[str, Habit] = {"a": "up", "b": "down"}


def pretrain(
    model: LlamaForCausalLM, habit: Habit, *, steps: int, peak: float, seed: int, told: Callable[[int, float], None]
) -> None:
    """Train `model` on fresh questions with answers of this habit; the prompt's tokens are not graded.

    Args:
        told: takes step and loss, in nats per token.
    """
    draw = random.Random(seed)
    optimizer = AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr(step, peak=peak, schedule="cosine", warmup=steps // 10, total=steps)
        ids, targets = _batch(habit, draw)
        loss = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        told(step + 1, loss.item())


def _batch(habit: Habit, draw: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.zeros(ROWS, CONTEXT, dtype=torch.long)
    targets = torch.full((ROWS, CONTEXT), IGNORED)
    longest = 0
    for row in range(ROWS):
        asked = question(draw)
        prompt, answer = encode(asked.prompt), encode(chain(asked, habit, draw))
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        targets[row, len(prompt) : end] = torch.tensor(answer)
        longest = max(longest, end)
    return ids[:, :longest], targets[:, :longest]


def make_teachers(root: Path, steps: tuple[int, int], told: Callable[[int, float], None]) -> None:
    """Both teachers below `root`; `steps` in any order and then in one."""
    base = TEACHER.build(seed=0)
    pretrain(base, "any", steps=steps[0], peak=3e-3, seed=1, told=told)
    for number, (name, habit) in enumerate(HABITS.items()):
        model = TEACHER.build(seed=0)
        model.load_state_dict(base.state_dict())
        pretrain(model, habit, steps=steps[1], peak=1e-3, seed=2 + number, told=told)
        save(model, root / name)


def make_base(folder: Path, steps: int, noise: float, told: Callable[[int, float], None]) -> None:
    """The model that students are fine-tuned from.

    Args:
        noise: added to the weights in the end, as a share of each matrix's own standard deviation.
    """
    base = STUDENT.build(seed=4)
    pretrain(base, "any", steps=steps, peak=6e-3, seed=5, told=told)
    draw = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for weight in base.parameters():
            if weight.ndim == 2:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=draw)
    save(base, folder)
