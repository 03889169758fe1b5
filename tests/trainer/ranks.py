"""Run by torchrun in the tests: take one step and save the gradient, as every rank together sees it.

torchrun ... tests/trainer/ranks.py MODEL DATASET LOSS_MEAN ROWS_PER_STEP RESULT
"""

import math
import sys
from pathlib import Path
from typing import Any, cast

import torch

from common.dataset import open_dataset
from trainer import epoch
from trainer.batch import pack
from trainer.config import OpdConfig
from trainer.model import load_sharded
from trainer.reader import Reader, step_plan
from trainer.run import rules_of
from trainer.step import train_step
from trainer.world import World, joined


def one_step(
    world: World, model_folder: str, data: str, loss_mean: Any, rows: int = 20, *, checkpointed: bool = False
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The full gradient of the first step, and how many tokens each rank trained in it."""
    settings: dict[str, Any] = {"rows_per_step": rows, "token_budget": 90, "loss_mean": loss_mean, "clip": math.inf}
    config = OpdConfig(model=model_folder, data=data, output="", objective="importance", **settings)
    dataset = open_dataset(data)
    reader = Reader(dataset, dataset.row_lengths())
    step = next(step_plan(reader.lengths, config, world.size))
    model = load_sharded(
        Path(model_folder), world, compute="float32", attention="sdpa", checkpoint_activations=checkpointed
    )
    batches = [pack(reader.rows(rows)) for rows in epoch.turns(step, world.rank, world.size)]
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), batches, rules_of(config), world)
    gradient = {name: cast(Any, weight.grad).full_tensor() for name, weight in model.named_parameters()}
    return gradient, world.gather(sum(len(batch.ids) for batch in batches))


if __name__ == "__main__":
    with joined("cpu") as this_world:
        result = one_step(this_world, *sys.argv[1:4], rows=int(sys.argv[4]))
        if this_world.is_first:
            torch.save(result, sys.argv[5])
