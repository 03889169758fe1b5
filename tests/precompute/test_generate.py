from collections import Counter
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.chat import Template, load_tokenizer
from common.errors import DataError
from common.prompts import Prompt
from precompute.engine.requests import GenerateRequest, Generation
from precompute.engine.vllm_outputs import generation as read
from precompute.generate import generate, samples_of, seed_of
from tests.precompute.conftest import Models


class Backwards:
    """A generator that finishes the last request first and samples its seed's low bytes."""

    def __init__(self) -> None:
        self.seen: list[GenerateRequest] = []

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Generation]:
        self.seen = list(requests)
        for request in reversed(self.seen):
            ids = np.array([request.seed % 251, request.seed % 127], np.int32)
            yield Generation(request.key, ids, np.full(2, -1.5, np.float32), "length")


def _prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{index}", f"question {index}", meta=f'{{"answer": {index}}}') for index in range(count)]


@given(st.integers(0, 2**64), st.text(), st.integers(0, 10_000))
def test_a_seed_fits_into_63_bits(plan_seed: int, prompt_id: str, sample_idx: int) -> None:
    assert 0 <= seed_of(plan_seed, prompt_id, sample_idx) < 2**63


def test_seeds_of_a_plan_are_distinct_and_known() -> None:
    seeds = {seed_of(s, f"p{p}", i) for s in range(3) for p in range(50) for i in range(8)}
    assert len(seeds) == 3 * 50 * 8
    assert seed_of(0, "p0", 0) == 2610373994484504499  # a release that changed it could resume no dataset


def test_a_seed_does_not_confuse_where_one_part_ends() -> None:
    assert seed_of(1, "1", 1) != seed_of(11, "", 1)
    assert seed_of(0, "p1", 0) != seed_of(0, "p", 10)


@settings(max_examples=200)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5))
def test_shards_hold_every_sample_exactly_once_in_order(prompts: int, per_shard: int, samples: int) -> None:
    given = _prompts(prompts)
    shards = [samples_of(shard, given, per_shard, samples) for shard in range(-(-prompts // per_shard))]
    assert all(shards)
    assert [(s.prompt.id, s.sample_idx) for shard in shards for s in shard] == [
        (prompt.id, index) for prompt in given for index in range(samples)
    ]
    for number, shard in enumerate(shards):
        assert [(s.shard, s.row) for s in shard] == [(number, row) for row in range(len(shard))]


def test_rollouts_keep_their_place_whatever_finishes_first(models: Models) -> None:
    samples = samples_of(0, _prompts(3), 3, 2)
    tokenizer = load_tokenizer(models.student)
    drawn = list(generate(Backwards(), samples, tokenizer, Template(), plan_seed=5, keep_text=True))
    assert [sample.row for sample, _ in drawn] == [5, 4, 3, 2, 1, 0]
    for sample, rollout in drawn:
        assert rollout.uid == f"{sample.prompt.id}/{sample.sample_idx}"
        assert (rollout.prompt_id, rollout.sample_idx) == (sample.prompt.id, sample.sample_idx)
        assert rollout.completion_ids[0] == seed_of(5, sample.prompt.id, sample.sample_idx) % 251
        assert rollout.meta == sample.prompt.meta
        assert rollout.prompt == sample.prompt.text
        assert "".join(tokenizer.convert_ids_to_tokens(rollout.prompt_ids.tolist())).startswith("<|user|>question")
    assert Counter(rollout.uid for _, rollout in drawn).most_common(1)[0][1] == 1


def test_seeds_do_not_depend_on_which_shards_a_worker_has(models: Models) -> None:
    prompts, tokenizer = _prompts(6), load_tokenizer(models.student)
    whole, part = Backwards(), Backwards()
    everything = [sample for shard in range(3) for sample in samples_of(shard, prompts, 2, 2)]
    list(generate(whole, everything, tokenizer, Template(), plan_seed=1, keep_text=False))
    list(generate(part, samples_of(2, prompts, 2, 2), tokenizer, Template(), plan_seed=1, keep_text=False))
    assert [request.seed for request in part.seen] == [request.seed for request in whole.seen][-4:]


def test_text_is_left_out_on_request(models: Models) -> None:
    tokenizer = load_tokenizer(models.student)
    [(_, rollout)] = generate(
        Backwards(), samples_of(0, _prompts(1), 1, 1), tokenizer, Template(), plan_seed=0, keep_text=False
    )
    assert (rollout.prompt, rollout.completion) == ("", "")


def test_what_the_engine_got_wrong_is_named_by_its_row() -> None:
    """Not by the whole sample, prompt and all."""
    request = GenerateRequest(object(), [1], 0, "p1/3")
    output = SimpleNamespace(outputs=[SimpleNamespace(finish_reason="stop", token_ids=[7], logprobs=[])])
    with pytest.raises(DataError, match=r"other tokens than it sampled \(row p1/3\)$"):
        read(request, output, 0)
