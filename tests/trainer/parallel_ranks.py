"""Run by torchrun in the tests: the gradient of one pack on every way to share a model out, as all ranks see it.

torchrun ... tests/trainer/parallel_ranks.py WAYS.json RESULT

WAYS is a list of [name, folder, dataset, keywords of `load_sharded`, replicas]; every rank has its own rows. With the
keyword `merge` it is the merged weights and the scores instead of the gradient.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from common.dataset import open_dataset
from common.schema import Rollout, to_rows
from trainer import objectives
from trainer.batch import Batch, pack
from trainer.config import Lora
from trainer.export import gather
from trainer.model import load_sharded
from trainer.step import Rules, score, train_step
from trainer.world import World, joined

PLAIN: dict[str, Any] = {"compute": "float32", "attention": "sdpa", "checkpoint_activations": False}


def gradients(world: World, folder: str, data: str, ways: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The gradient of the imitation loss over eight rows, whichever rank has them; whole, by name."""
    return gradient_of(_load(world, folder, ways), [pack(_rows(data)[world.rank :: world.size])], world)


def merged_and_scored(
    world: World, folder: str, data: str, ways: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The weights as an export has them, on rank 0, and the log-probs of the eight rows by the model itself."""
    model = _load(world, folder, ways)
    chosen = score(model, pack(_rows(data)), temperature=1.0, chunk=64).chosen
    return gather(model, torch.float32, world), chosen


def _load(world: World, folder: str, ways: dict[str, Any]) -> PreTrainedModel:
    lora = Lora(**ways["lora"]) if "lora" in ways else None
    model = load_sharded(Path(folder), world, **{**PLAIN, **ways, "lora": lora})
    wake(model)
    return model


def _rows(data: str) -> list[Rollout]:
    return list(to_rows(open_dataset(data).read_shard(0)))[:8]


def gradient_of(model: PreTrainedModel, batches: list[Batch], world: World) -> dict[str, torch.Tensor]:
    """What one step would follow: the gradient of -mean log-prob of the tokens of all ranks."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    rules = Rules(objectives.imitation, "token", math.inf, math.inf, 64)
    train_step(model, torch.optim.SGD(trained.values(), lr=0.0), batches, rules, world)
    return {name: cast(Any, weight.grad).full_tensor() for name, weight in trained.items()}


def wake(model: torch.nn.Module) -> None:
    """Adapters that begin as no change at all would hide what is wrong with them."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight += 0.02


if __name__ == "__main__":
    cases, result = sys.argv[1:]
    found: dict[str, Any] = {}
    with joined("cpu") as first:
        for name, folder, data, ways, replicas in json.loads(Path(cases).read_text()):
            mesh = first.mesh
            if replicas > 1:
                shape = (replicas, first.size // replicas)
                mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
            find = merged_and_scored if ways.pop("merge", False) else gradients
            found[name] = find(replace(first, mesh=mesh), folder, data, ways)
        if first.is_first:
            torch.save(found, result)
