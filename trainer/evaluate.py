"""How far a model is from its teacher: the exact reverse KL over the whole vocabulary, at states of its own.

The states are fresh rollouts of that very model on held-out prompts; at each, KL(model || teacher) is summed over every
token of the vocabulary, so the only chance left is which states were visited. The interval resamples prompts, because
tokens of one prompt are not independent.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from common.dataset import Dataset, open_dataset, require_kind
from common.errors import DataError
from common.lineage import ModelIdentity, compare_tokenizers, identify, read_provenance, require_policy
from common.models import reference, resolve
from common.schema import Rollout, to_rows
from common.storage import Store
from trainer.architectures import require_attention
from trainer.batch import Batch, pack
from trainer.config import EvalConfig
from trainer.logprobs import logprob_rows
from trainer.model import COMPUTE_TYPES, head_weight, hidden_states, load_plain
from trainer.parity import cut_short


def evaluate(
    config: EvalConfig, device: torch.device, advance: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Measure, write the result to `config.output` as JSON, and return it.

    Args:
        advance: called with (rows, tokens) after each forward pass.

    Raises:
        DataError: the dataset was sampled by another model or otherwise than from its own distribution, or the
            tokenizers differ.
        UsageError: the attention backend cannot run here.
    """
    require_attention(config.attention, device.type, config.compute)
    folder, teacher_folder = resolve(config.model), resolve(config.teacher)
    dataset = open_dataset(config.data)
    require_kind(dataset, "rollouts")
    _require_own_samples(dataset)
    student_id = identify(folder, reference(config.model))
    teacher_id = identify(teacher_folder, reference(config.teacher))
    require_policy(ModelIdentity.model_validate(dataset.plan["policy"]), student_id, dataset=dataset.url)
    compare_tokenizers(folder, teacher_folder)
    student, teacher = (_load(place, config, device) for place in (folder, teacher_folder))
    prompts = _by_prompt(student, teacher, dataset, config, device, advance)
    result = {
        "reverse_kl": interval(list(prompts.values()), config.bootstrap, config.seed),
        "unit": "nats per token",
        "tokens": sum(tokens for _, tokens in prompts.values()),
        "rows": dataset.num_rows,
        "prompts": len(prompts),
        "by_prompt": {prompt: list(sums) for prompt, sums in prompts.items()},
        "model": student_id.model_dump(),
        "teacher": teacher_id.model_dump(),
        "data": {"url": dataset.url, "manifest_sha256": dataset.manifest_sha256},
        "sampling": dataset.plan["sampling"],
        "overrides": _overrides(dataset, folder),
    }
    place, _, name = config.output.rpartition("/")
    Store(place or ".").put(name, (json.dumps(result, indent=2) + "\n").encode())
    return result


def _by_prompt(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: Dataset,
    config: EvalConfig,
    device: torch.device,
    advance: Callable[[int, int], None] | None,
) -> dict[str, tuple[float, int]]:
    """Summed KL and tokens of each prompt's completions, by the prompt's id."""
    prompts: dict[str, tuple[float, int]] = {}
    for rows in _packs(dataset, config.token_budget):
        batch = pack(rows).to(device)
        kls = batch.per_row(reverse_kl(student, teacher, batch, config.logits_chunk))
        for row, kl in zip(rows, kls, strict=True):
            total, tokens = prompts.get(row.prompt_id, (0.0, 0))
            prompts[row.prompt_id] = (total + float(kl.sum(dtype=float)), tokens + len(kl))
        if advance:
            advance(len(rows), len(batch.ids))
    return prompts


@torch.no_grad()
def reverse_kl(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, chunk: int) -> torch.Tensor:
    """KL(student || teacher) in nats before each completion token of the batch, (tokens,) float32.

    Where the two vocabularies are padded to different sizes, both are taken over the ids they share.
    """
    ours, theirs = head_weight(student), head_weight(teacher)
    vocab = min(len(ours), len(theirs))
    hidden = [
        hidden_states(model, batch.input_ids, batch.position_ids)[batch.predictors] for model in (student, teacher)
    ]
    pieces = zip(
        logprob_rows(hidden[0], ours, vocab=vocab, chunk=chunk),
        logprob_rows(hidden[1], theirs, vocab=vocab, chunk=chunk),
        strict=True,
    )
    return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pieces])


def interval(prompts: Sequence[tuple[float, int]], resamples: int, seed: int) -> dict[str, float]:
    """Mean per token with its 95% percentile bootstrap interval over prompts.

    Args:
        prompts: (sum, tokens) of each prompt; the mean is the ratio of the totals, in each resample too.
    """
    sums, counts = (np.array(column, float) for column in zip(*prompts, strict=True))
    draws = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(sums.sum() / counts.sum()), "low": float(low), "high": float(high)}


def _require_own_samples(dataset: Dataset) -> None:
    """The mean over states is the policy's only where the policy itself, untouched, chose them."""
    sampling = dataset.plan["sampling"]
    what = cut_short(sampling)
    if what is None and sampling["temperature"] != 1:
        what = f"the rollouts were sampled at temperature={sampling['temperature']}, not 1"
    if what:
        raise DataError(
            f"these are not states of the model's own: {what}",
            where=dataset.url,
            fix="Sample held-out rollouts at temperature 1, with top_p=1, top_k=0 and min_p=0",
        )


def _overrides(dataset: Dataset, folder: Path) -> list[str]:
    """The overridden checks behind the model or its rollouts."""
    known = read_provenance(folder)
    return sorted({*dataset.plan["overrides"], *(known.overrides if known else ())})


def _load(folder: Path, config: EvalConfig, device: torch.device) -> PreTrainedModel:
    model = load_plain(folder, dtype=COMPUTE_TYPES[config.compute], attention=config.attention)
    return model.eval().to(device)  # type: ignore[arg-type]


def _packs(dataset: Dataset, budget: int) -> Iterator[list[Rollout]]:
    """Rows in dataset order, as many together as the budget holds; a longer row alone."""
    rows: list[Rollout] = []
    room = budget
    for shard in range(dataset.num_shards):
        for row in to_rows(dataset.read_shard(shard)):
            length = len(row.prompt_ids) + len(row.completion_ids)
            if rows and length > room:
                yield rows
                rows, room = [], budget
            rows.append(row)
            room -= length
    if rows:
        yield rows
