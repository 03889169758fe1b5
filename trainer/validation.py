"""Rows that are never trained on, and how well the model does on them.

Which rows: whole prompts, so that no sample of a held-out prompt is trained on, by the hash of their id. So the choice
is the same in every run, with every seed and number of ranks, and in every dataset made from these prompts; a larger
share holds out the same prompts and more.
"""

import time

import numpy as np
import torch
from transformers import PreTrainedModel

from common.dataset import Dataset
from common.lengths import RowLengths
from trainer import epoch
from trainer.batch import Batch, pack
from trainer.config import OpdConfig, TrainConfig
from trainer.reader import Reader
from trainer.step import score
from trainer.world import World


def held_out(lengths: RowLengths, share: float, most: int) -> np.ndarray:
    """Which rows are held out, (rows,) bool: as many prompts as `share` and `most` rows allow."""
    limit = min(int(share * len(lengths)), most)
    keys, counts = np.unique(lengths.prompt_key, return_counts=True)  # in ascending order, which is as good as random
    return np.isin(lengths.prompt_key, keys[: np.searchsorted(np.cumsum(counts), limit, side="right")])


class Validation:
    """The model on the held-out rows, which every rank has its share of in memory; all ranks call it together.

    Args:
        held: where the held-out rows lie; without any, there is nothing to tell.

    Raises:
        DataError: a shard is missing or altered.
    """

    def __init__(self, dataset: Dataset, held: RowLengths, config: TrainConfig, world: World, total_steps: int) -> None:
        self._config, self._world, self._total_steps = config, world, total_steps
        step = epoch.pack(np.arange(len(held)), held.total, config.token_budget, world.size)
        bins = epoch.turns(step, world.rank, world.size)
        rows = iter(world.together(lambda: Reader(dataset, held).rows([row for bin in bins for row in bin])))
        self._batches = [pack([next(rows) for _ in bin]) for bin in bins]

    def figures(self, model: PreTrainedModel, step: int) -> dict[str, float]:
        """The figures after `step` steps: every `validate_every` and after the last; none at other steps.

        SFT: validation/loss, the mean of -log pi_theta per token. OPD: validation/teacher_k1, an estimate of
        KL(pi_theta || pi_T) as sum w (log pi_theta - log pi_T) / sum w with w = min(pi_theta / pi_rollout, bound),
        which forgives that the rollouts are not this policy's own any more.
        """
        if not self._batches or (step % self._config.validate_every and step != self._total_steps):
            return {}
        began = time.monotonic()
        sums = torch.stack([self._sums(model, batch) for batch in self._batches]).sum(0)
        tokens, weight, total = self._world.sum(sums).tolist()
        name = "teacher_k1" if isinstance(self._config, OpdConfig) else "loss"
        return {
            f"validation/{name}": total / weight,
            "validation/tokens": tokens,
            "time/validation": time.monotonic() - began,
        }

    @torch.no_grad()
    def _sums(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """Tokens, their weight and the weighted sum of one micro-batch, (3,) float64; an empty one runs along."""
        batch = batch.to(self._world.device)
        student = score(model, batch, temperature=1.0, chunk=self._config.logits_chunk).chosen.double()
        weight, values = torch.ones_like(student), -student
        if isinstance(self._config, OpdConfig):
            weight = (student - batch.rollout).exp().clamp(max=self._config.max_importance_ratio)
            values = student - batch.teacher
        return torch.stack([weight.new_tensor(len(student)), weight.sum(), (weight * values).sum()])
