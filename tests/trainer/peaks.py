"""Run by the tests of the memory plan: take two steps on random rows, and say what torch allocated at most.

python -m tests.trainer.peaks MODEL DEVICE KEY=VALUE...     prints {"peak": bytes} as JSON, on rank 0

On a CPU every allocation of torch is in the profiler's record, so the peak is exact and does not depend on the machine.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from common.schema import Rollout
from trainer.batch import Batch, pack
from trainer.cli import settings_from
from trainer.config import OpdConfig
from trainer.loop import optimizer_of
from trainer.model import load_sharded
from trainer.run import rules_of
from trainer.step import train_step
from trainer.world import World, joined

STEPS = 2
ROWS = 4
PROMPT = 8


def packed(config: OpdConfig, vocab: int) -> Batch:
    """Random rows that fill the token budget."""
    generator = np.random.default_rng(0)
    length = config.token_budget // ROWS
    rows = []
    for index in range(ROWS):
        ids = generator.integers(0, vocab, length).astype(np.int32)
        logprobs = np.full(length - PROMPT, -1.0, np.float32)
        rows.append(
            Rollout(
                uid=str(index),
                prompt_id=str(index),
                sample_idx=0,
                prompt_ids=ids[:PROMPT],
                completion_ids=ids[PROMPT:],
                rollout_logprobs=logprobs,
                teacher_logprobs=logprobs,
                finish_reason="length",
            )
        )
    return pack(rows)


def open_model(config: OpdConfig, world: World) -> PreTrainedModel:
    """The model as a run has it."""
    return load_sharded(
        Path(config.model),
        world,
        compute=config.compute,
        attention=config.attention,
        checkpoint_activations=config.activation_checkpointing,
        cpu_offload=config.cpu_offload,
        lora=config.lora,
    )


def train(model: PreTrainedModel, config: OpdConfig, world: World) -> None:
    """Two steps of two micro-batches: moments are there from the second on, gradients accumulate within each."""
    optimizer = optimizer_of(model, config)
    batches = [packed(config, model.config.vocab_size).to(world.device)] * 2
    for _ in range(STEPS):
        train_step(model, optimizer, batches, rules_of(config), world)
        optimizer.zero_grad(set_to_none=True)


def peak_on_cpu(config: OpdConfig, world: World) -> int:
    """Bytes of the parameters, and the most that was alive beside them, from the record of every allocation.

    A release on a thread of gloo's is in no record; that the address is given out again tells of it.
    """
    model = open_model(config, world)
    own = sum(cast(Any, weight).to_local().nbytes for weight in model.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(model, config, world)
    record: Any = profiler.profiler
    alive: dict[int, int] = {}
    now = most = 0
    for _, address, size in sorted(allocations(record.kineto_results.experimental_event_tree())):
        now += max(size, 0) - alive.pop(address, 0)
        if size > 0:
            alive[address] = size
        most = max(most, now)
    return own + most


def allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """When, where and how many bytes; negative for a release."""
    for event in events:
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from allocations(event.children)


def peak_on_cuda(config: OpdConfig, world: World) -> int:
    """The most that torch's allocator had given out."""
    model = open_model(config, world)
    torch.cuda.reset_peak_memory_stats()
    train(model, config, world)
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    device: Any = sys.argv[2]
    settings = settings_from(
        OpdConfig, "opd", [f"model={sys.argv[1]}", "data=-", "output=-", "objective=importance", *sys.argv[3:]]
    )
    with joined(device, settings.replicas) as this_world:
        most = peak_on_cuda(settings, this_world) if device == "cuda" else peak_on_cpu(settings, this_world)
        if this_world.is_first:
            print(json.dumps({"peak": most}))  # noqa: T201
