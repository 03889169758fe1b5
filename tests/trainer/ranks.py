"""Run by torchrun in the tests: take one step and save the gradient, as every rank together sees it.

torchrun ... tests/trainer/ranks.py MODEL DATASET LOSS_MEAN RESULT
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
    world: World, model_folder: str, data: str, loss_mean: Any, *, checkpointed: bool = False
) -> tuple[dict[str, torch.Tensor], int]:
    """The full gradient of the first step, and its number of bins."""
    config = OpdConfig(
        model=model_folder, data=data, output="", token_budget=90, rows_per_step=20, loss_mean=loss_mean, clip=math.inf
    )
    dataset = open_dataset(data)
    reader = Reader(dataset, dataset.row_lengths())
    step = next(step_plan(reader.lengths, config, world.size))
    model = load_sharded(
        Path(model_folder), world, compute="float32", attention="sdpa", checkpoint_activations=checkpointed
    )
    batches = [pack(reader.rows(rows)) for rows in epoch.turns(step, world.rank, world.size)]
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), batches, rules_of(config), world)
    return {name: cast(Any, weight.grad).full_tensor() for name, weight in model.named_parameters()}, len(step)


if __name__ == "__main__":
    with joined("cpu") as this_world:
        gradient, bins = one_step(this_world, *sys.argv[1:4])
        if this_world.is_first:
            torch.save((gradient, bins), sys.argv[4])
