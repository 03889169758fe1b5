"""Prompts -> rollouts of a policy. Pure against `requests.Generator`."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.chat import Template, render
from common.prompts import Prompt
from common.schema import Rollout, uid_of
from precompute.engine.requests import GenerateRequest, Generation, Generator


@dataclass(frozen=True)
class Sample:
    """One completion to be: its place in the dataset, its prompt, and which of that prompt's samples it is."""

    shard: int
    row: int
    prompt: Prompt
    sample_idx: int

    @property
    def uid(self) -> str:
        """The name of its row."""
        return uid_of(self.prompt.id, self.sample_idx)


def seed_of(plan_seed: int, prompt_id: str, sample_idx: int) -> int:
    """The sampling seed of one completion: 63 bits from (plan seed, prompt, sample), never from the worker."""
    digest = hashlib.sha256(f"{plan_seed}\0{prompt_id}\0{sample_idx}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def samples_of(shard: int, prompts: Sequence[Prompt], prompts_per_shard: int, samples: int) -> list[Sample]:
    """All completions of one shard, a contiguous slice of the prompts, in dataset order."""
    chosen = prompts[shard * prompts_per_shard : (shard + 1) * prompts_per_shard]
    drawn = [(prompt, index) for prompt in chosen for index in range(samples)]
    return [Sample(shard, row, prompt, index) for row, (prompt, index) in enumerate(drawn)]


def generate(
    engine: Generator,
    samples: Iterable[Sample],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    plan_seed: int,
    keep_text: bool,
) -> Iterator[tuple[Sample, Rollout]]:
    """Sample completions, in the order in which they finish."""

    def requests() -> Iterator[GenerateRequest]:
        prompt, prompt_ids = None, list[int]()
        for sample in samples:
            if sample.prompt is not prompt:  # all samples of one come one after another
                prompt, prompt_ids = sample.prompt, render(tokenizer, sample.prompt, template)
            seed = seed_of(plan_seed, sample.prompt.id, sample.sample_idx)
            yield GenerateRequest((sample, prompt_ids), prompt_ids, seed, sample.uid)

    for generation in engine.generate(requests()):
        sample, prompt_ids = generation.key
        text = str(tokenizer.decode(generation.completion_ids.tolist())) if keep_text else ""
        yield sample, _rollout(sample, prompt_ids, generation, text, keep_text)


def _rollout(sample: Sample, prompt_ids: list[int], generation: Generation, text: str, keep_text: bool) -> Rollout:
    return Rollout(
        uid=sample.uid,
        prompt_id=sample.prompt.id,
        sample_idx=sample.sample_idx,
        prompt_ids=np.asarray(prompt_ids, np.int32),
        completion_ids=generation.completion_ids,
        rollout_logprobs=generation.logprobs,
        rollout_topk_ids=generation.topk_ids,
        finish_reason=generation.finish_reason,
        prompt=sample.prompt.as_text() if keep_text else "",
        completion=text,
        meta=sample.prompt.meta,
    )
