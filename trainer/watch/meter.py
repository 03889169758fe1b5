"""What a step was, in figures: every rank's numbers in one all-reduce, and the clock."""

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from trainer import metrics
from trainer.batch import Batch
from trainer.config import OpdConfig, TrainConfig
from trainer.watch.flops import cost_of, peak_flops, peak_memory, work_of
from trainer.world import World


class Meter:
    """Measures the steps of one run; `figures` is called by all ranks together."""

    def __init__(self, config: TrainConfig, world: World, model: PreTrainedModel) -> None:
        self._config, self._world = config, world
        self._cost, self._peak = cost_of(model), peak_flops(world.device, config.compute)

    def figures(self, sums: Tensor, batches: Sequence[Batch], *, began: float, loaded: float) -> dict[str, Any]:
        """The figures of a step from this rank's numbers.

        Args:
            sums: what `train_step` returned.
            batches: this rank's, on the CPU.
            began, loaded: by the monotonic clock, when the step began and when its batches were there.
        """
        world = self._world
        work = work_of(batches, self._cost)
        held = metrics.vector(sums.device, wait=loaded - began, memory=peak_memory(world.device), **work)
        total = world.sum(metrics.spread(metrics.merged(sums, held), world.rank, world.size)).cpu()
        seconds = time.monotonic() - began  # after the copy to the CPU, which waits for the GPU
        trained = metrics.distillation if isinstance(self._config, OpdConfig) else metrics.imitation
        return {
            **trained(total),
            **metrics.work(
                total,
                seconds=seconds,
                ranks=world.size,
                token_budget=self._config.token_budget,
                peak_flops=self._peak,
            ),
        }
