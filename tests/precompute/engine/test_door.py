"""The real engine against an independent Hugging Face forward pass, on SmolLM2-135M in float32.

Exactness is stated in float32: where the CPU multiplies bfloat16 matrices in tiles, two batch shapes differ by some
hundredths of a nat. In float32 the largest difference seen is 5e-5 nats; a shift by one token makes 3 nats on average.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from common.chat import Template, load_tokenizer, render
from common.errors import DataError, UsageError
from common.prompts import Prompt
from common.schema import Rollout
from precompute.config import Engine as EngineConfig
from precompute.config import Sampling, Support
from precompute.engine.door import Engine
from precompute.engine.requests import EngineDied, GenerateRequest, Generation, ScoreRequest
from precompute.engine.vllm_settings import WINDOW_PER_SEQ
from precompute.generate import generate, samples_of
from precompute.score import Unscored, score
from precompute.self_test import batch_noise

pytestmark = pytest.mark.slow

TOLERANCE = 2e-3  # nats
LONGEST, TOPK, MAX_SEQS = 24, 4, 8
PROMPTS = (
    "What is the capital of France?",
    "Write one line of Python that reverses a string.",
    "Name three prime numbers.",
    "Continue the story: the rain had stopped when",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
)


@dataclass(frozen=True)
class Example:
    """One engine, and what it sampled and graded; the tests only read it."""

    folder: Path
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    network: LlamaForCausalLM
    sampled: list[Rollout]
    rollouts: list[Rollout]  # graded by the engine that sampled them
    tables: list[np.ndarray]  # (tokens, vocab) float32 nats, of the Hugging Face forward


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    from recipes.demo.models import build_teacher

    torch.set_num_threads(1)  # on a busy box two threads wait for each other longer than they compute
    folder = tmp_path_factory.mktemp("smollm2")
    build_teacher(folder)
    tokenizer = load_tokenizer(folder)
    stop_ids = tuple(tokenizer.get_vocab()[token] for token in ("<|im_end|>", "."))
    sampling = Sampling(samples=2, max_tokens=LONGEST, stop_ids=stop_ids, seed=7)
    config = EngineConfig(dtype="float32", max_num_seqs=MAX_SEQS, cpu_kv_gib=0.25, compile=False)
    engine = Engine(folder, config, max_model_len=160, sampling=sampling, topk=TOPK)
    network = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sampled = _sampled(engine, tokenizer, sampling)
    rollouts = _graded(engine, sampled)
    tables = [_forward(network, row) for row in rollouts]
    yield Example(folder, engine, tokenizer, stop_ids, network, sampled, rollouts, tables)
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()  # later tests make process groups of their own


def _sampled(engine: Engine, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> list[Rollout]:
    samples = samples_of(0, [Prompt(f"p{i}", text) for i, text in enumerate(PROMPTS)], len(PROMPTS), sampling.samples)
    drawn = generate(engine, samples, tokenizer, Template(), plan_seed=sampling.seed, keep_text=True)
    return [rollout for _, rollout in sorted(drawn, key=lambda pair: pair[0].row)]


def _graded(engine: Engine, rollouts: Sequence[Rollout]) -> list[Rollout]:
    rows = [Unscored(0, row, rollout) for row, rollout in enumerate(rollouts)]
    return [rollout for _, rollout in sorted(score(engine, rows, topk=TOPK), key=lambda pair: pair[0].row)]


@torch.no_grad()
def _forward(network: LlamaForCausalLM, row: Rollout) -> np.ndarray:
    """Log-probs of the whole vocabulary before each completion token, (tokens, vocab)."""
    ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.completion_ids]).astype(np.int64))
    return network(ids[None], use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1).numpy()


def _chosen(table: np.ndarray, row: Rollout) -> np.ndarray:
    return np.take_along_axis(table, row.completion_ids[:, None].astype(np.int64), axis=1)[:, 0]


def _all(arrays: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(array) for array in arrays])


def _again(example: Example, rows: Sequence[int], seed_shift: int = 0) -> dict[int, Generation]:
    """Sample some of the example's rows anew, in this order."""
    from precompute.generate import seed_of

    requests = [
        GenerateRequest(
            row,
            example.rollouts[row].prompt_ids.tolist(),
            seed_of(7, example.rollouts[row].prompt_id, example.rollouts[row].sample_idx) + seed_shift,
            example.rollouts[row].uid,
        )
        for row in rows
    ]
    return {generation.key: generation for generation in example.engine.generate(requests)}


def test_rollout_logprobs_are_those_of_an_independent_forward_pass(example: Example) -> None:
    expected = _all([_chosen(table, row) for table, row in zip(example.tables, example.rollouts, strict=True)])
    sampled = _all([row.rollout_logprobs for row in example.rollouts])
    assert np.abs(sampled - expected).max() <= TOLERANCE


def test_teacher_logprobs_are_those_of_an_independent_forward_pass(example: Example) -> None:
    expected = _all([_chosen(table, row) for table, row in zip(example.tables, example.rollouts, strict=True)])
    scored = _all([row.teacher_logprobs for row in example.rollouts])
    assert np.abs(scored - expected).max() <= TOLERANCE


def test_the_tolerance_is_far_below_a_shift_by_one_token(example: Example) -> None:
    expected = [_chosen(table, row) for table, row in zip(example.tables, example.rollouts, strict=True)]
    shifted = _all([np.roll(logprobs, 1) - logprobs for logprobs in expected])
    assert np.abs(shifted).mean() > 100 * TOLERANCE


def test_rescoring_a_rollout_with_its_own_policy_changes_nothing(example: Example) -> None:
    sampled = _all([row.rollout_logprobs for row in example.rollouts])
    scored = _all([row.teacher_logprobs for row in example.rollouts])
    assert np.abs(sampled - scored).max() <= TOLERANCE


def test_stored_topk_is_the_real_topk(example: Example) -> None:
    for table, row in zip(example.tables, example.rollouts, strict=True):
        assert row.topk_ids is not None and row.topk_logprobs is not None
        assert row.topk_ids.shape == row.topk_logprobs.shape == (len(row.completion_ids), TOPK)
        best = -np.sort(-table, axis=1)[:, :TOPK]
        assert np.abs(row.topk_logprobs - best).max() <= TOLERANCE
        named = np.take_along_axis(table, row.topk_ids.astype(np.int64), axis=1)
        assert np.abs(row.topk_logprobs - named).max() <= TOLERANCE
        assert all(len(set(ids)) == TOPK for ids in row.topk_ids.tolist())


def test_the_students_topk_is_stored_as_it_was_when_it_sampled(example: Example) -> None:
    for table, row in zip(example.tables, example.sampled, strict=True):
        assert row.rollout_topk_ids is not None
        assert row.rollout_topk_ids.shape == (len(row.completion_ids), TOPK)
        named = np.take_along_axis(table, row.rollout_topk_ids.astype(np.int64), axis=1)
        assert np.abs(named + np.sort(-table, axis=1)[:, :TOPK]).max() <= TOLERANCE


def test_the_company_in_a_batch_moves_a_logprob_no_more_than_rounding(example: Example) -> None:
    rows = [Unscored(0, row, rollout) for row, rollout in enumerate(example.rollouts[:4])]
    noise = batch_noise(example.engine, rows)
    assert noise is not None and noise <= TOLERANCE


def test_the_sampled_tokens_logprob_is_kept_outside_the_topk(example: Example) -> None:
    outside = [
        (token, row.teacher_logprobs[position], table[position])
        for table, row in zip(example.tables, example.rollouts, strict=True)
        for position, token in enumerate(row.completion_ids)
        if row.topk_ids is not None and row.teacher_logprobs is not None and token not in row.topk_ids[position]
    ]
    assert len(outside) >= 5
    assert all(abs(logprob - expected[token]) <= TOLERANCE for token, logprob, expected in outside)


def test_prompt_ids_are_those_of_the_chat_template(example: Example) -> None:
    for row in example.rollouts:
        text = PROMPTS[int(row.prompt_id[1:])]
        assert row.prompt_ids.tolist() == render(example.tokenizer, Prompt("", text), Template())


def test_ids_that_no_text_encodes_to_are_graded_as_they_are(example: Example) -> None:
    letters = [example.tokenizer.get_vocab()[letter] for letter in "hello"]
    text = example.tokenizer.decode(letters)
    assert example.tokenizer(text)["input_ids"] != letters
    row = Rollout(
        "u", "p", 0, np.array(letters[:1], np.int32), np.array(letters[1:], np.int32), np.zeros(4, np.float32)
    )
    [graded] = _graded(example.engine, [row])
    assert graded.teacher_logprobs is not None
    assert np.abs(graded.teacher_logprobs - _chosen(_forward(example.network, row), row)).max() <= TOLERANCE


def test_a_seed_gives_the_same_tokens_in_any_company_and_order(example: Example) -> None:
    again = _again(example, [9, 2])
    for row, generation in again.items():
        assert generation.completion_ids.tolist() == example.rollouts[row].completion_ids.tolist()


def test_another_seed_gives_other_tokens(example: Example) -> None:
    again = _again(example, [9, 2], seed_shift=1)
    for row, generation in again.items():
        assert generation.completion_ids.tolist() != example.rollouts[row].completion_ids.tolist()


def test_samples_of_one_prompt_differ(example: Example) -> None:
    completions = {tuple(row.completion_ids.tolist()) for row in example.rollouts}
    assert len(completions) == len(example.rollouts)


def test_a_stop_id_ends_a_completion_and_is_part_of_it(example: Example) -> None:
    stopped = [row for row in example.rollouts if row.finish_reason == "stop"]
    assert stopped
    for row in stopped:
        assert row.completion_ids[-1] in example.stop_ids
        assert not np.isin(row.completion_ids[:-1], example.stop_ids).any()
        assert len(row.rollout_logprobs) == len(row.completion_ids)


def test_a_completion_without_stop_id_ends_at_max_tokens(example: Example) -> None:
    cut = [row for row in example.rollouts if row.finish_reason != "stop"]
    assert cut
    for row in cut:
        assert row.finish_reason == "length"
        assert len(row.completion_ids) == LONGEST
        assert not np.isin(row.completion_ids, example.stop_ids).any()


def test_stored_text_is_the_decoded_completion(example: Example) -> None:
    for row in example.rollouts:
        assert row.completion == example.tokenizer.decode(row.completion_ids.tolist())
        assert row.prompt == PROMPTS[int(row.prompt_id[1:])]


def test_results_stream_through_a_bounded_window(example: Example) -> None:
    taken, returned, total = 0, 0, 5 * WINDOW_PER_SEQ * MAX_SEQS

    def requests() -> Iterator[ScoreRequest]:
        nonlocal taken
        for number in range(total):
            taken += 1
            yield ScoreRequest(number, np.array([1, 2], np.int32), np.array([3, 4], np.int32), str(number))

    for _ in example.engine.score(requests()):
        returned += 1
        if returned == 1:
            assert taken < total
        assert taken - returned <= WINDOW_PER_SEQ * MAX_SEQS
    assert returned == total


def test_a_stream_left_early_leaves_nothing_for_the_next_one(example: Example) -> None:
    one = ScoreRequest("abandoned", np.array([1, 2], np.int32), np.array([3, 4], np.int32), "abandoned")
    stream = example.engine.score([one] * (WINDOW_PER_SEQ * MAX_SEQS))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    again = _again(example, [2])
    assert again[2].completion_ids.tolist() == example.rollouts[2].completion_ids.tolist()


class Diary:
    """Who went in, and how many steps the engine has made; it ends the stream at the step it is told to."""

    def __init__(self, last_step: int | None = None) -> None:
        self.entered: list[tuple[str, ...]] = []
        self.refusals: dict[str, str] = {}
        self.steps, self.last_step = 0, last_step

    def entering(self, uids: Sequence[str]) -> None:
        self.entered.append(tuple(uids))

    def refused(self, uid: str, reason: str) -> None:
        self.refusals[uid] = reason

    def dying(self) -> None:
        raise AssertionError("no engine dies here")

    def stepped(self) -> None:
        self.steps += 1
        if self.steps == self.last_step:
            raise TimeoutError("enough")


@contextmanager
def _watched(engine: Engine, watch: Diary, window: int) -> Iterator[None]:
    """The example's engine under the eyes of `watch`, with another window."""
    before = engine.window
    engine.watch, engine.window = watch, window
    try:
        yield
    finally:
        engine.watch, engine.window = None, before


def _short_rows(count: int) -> list[ScoreRequest]:
    return [
        ScoreRequest(number, np.array([1, 2], np.int32), np.array([3, 4], np.int32), f"row {number}")
        for number in range(count)
    ]


def test_rows_are_told_before_they_enter_and_never_more_at_once_than_the_window(example: Example) -> None:
    watch, left = Diary(), 0
    with _watched(example.engine, watch, window=3):
        for _ in example.engine.score(_short_rows(10)):
            told = sum(map(len, watch.entered))
            assert told - left <= 3
            left += 1
    assert [uid for uids in watch.entered for uid in uids] == [f"row {number}" for number in range(10)]
    assert watch.entered[0] == ("row 0", "row 1", "row 2")
    assert watch.steps >= 4


def test_with_a_window_of_one_a_row_is_alone(example: Example) -> None:
    watch = Diary()
    with _watched(example.engine, watch, window=1):
        assert len(list(example.engine.score(_short_rows(4)))) == 4
    assert watch.entered == [("row 0",), ("row 1",), ("row 2",), ("row 3",)]


def test_whoever_watches_can_end_the_stream_and_leaves_nothing_for_the_next_one(example: Example) -> None:
    with _watched(example.engine, Diary(last_step=1), window=4), pytest.raises(TimeoutError, match="enough"):
        list(example.engine.score(_short_rows(9)))
    assert not example.engine._llm.llm_engine.has_unfinished_requests()
    again = _again(example, [2])
    assert again[2].completion_ids.tolist() == example.rollouts[2].completion_ids.tolist()


def test_a_request_that_vllm_refuses_is_named_and_the_engine_lives_on(example: Example) -> None:
    long = ScoreRequest("long", np.ones(200, np.int32), np.ones(9, np.int32), "p7/1")
    with pytest.raises(DataError, match=r"vLLM refuses a request: .*\(row p7/1\)"):
        list(example.engine.score([*_short_rows(2), long]))
    assert len(list(example.engine.score(_short_rows(2)))) == 2


def test_whoever_watches_is_told_of_rows_that_vllm_refuses_and_all_others_are_made(example: Example) -> None:
    first, *rows = _short_rows(4)
    long = [replace(first, prompt_ids=np.ones(200, np.int32), uid=uid) for uid in ("p7/1", "p8/0", "p9/0")]
    diary = Diary()
    with _watched(example.engine, diary, window=2):
        made = {scores.key for scores in example.engine.score([*long[:2], *rows, long[2]])}
    assert made == {1, 2, 3}
    assert list(diary.refusals) == ["p7/1", "p8/0", "p9/0"]
    assert all(reason.startswith("vLLM refuses a request: ") for reason in diary.refusals.values())


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.50 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (AssertionError("num_scheduled_tokens"), False),
    ],
)
def test_a_step_that_fails_is_the_death_of_the_engine(
    example: Example, monkeypatch: pytest.MonkeyPatch, error: Exception, out_of_memory: bool
) -> None:
    def fail() -> None:
        raise error

    core = example.engine._llm.llm_engine
    with monkeypatch.context() as patch:
        patch.setattr(core, "step", fail)
        with pytest.raises(EngineDied, match="vLLM's engine died") as died:
            list(example.engine.score(_short_rows(3)))
    assert died.value.out_of_memory == out_of_memory
    assert died.value.exit_code == 75
    assert not example.engine.alive
    core.abort_request(list(core.output_processor.request_states))  # nothing broke in truth, so that it can go on
    example.engine.alive = True


def test_an_engine_that_cannot_grade_given_ids_is_refused_before_its_model_is_loaded(
    example: Example, tmp_path: Path
) -> None:
    """The folder holds no weights: loading would fail otherwise."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(example.folder / name, tmp_path / name)
    config = EngineConfig(dtype="float32", max_num_seqs=MAX_SEQS, cpu_kv_gib=0.25, compile=False)
    with pytest.raises(UsageError, match="cannot grade the student's top-k: .* without its V2 model runner"):
        Engine(tmp_path, config, max_model_len=160, topk=2, support="student")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_every_way_to_grade_gives_the_same_numbers(tmp_path: Path) -> None:
    """Of one sequence; bfloat16 kernels of two batch shapes may differ by a few hundredths of a nat."""
    from recipes.demo.models import build_teacher

    build_teacher(tmp_path)
    config = EngineConfig(dtype="bfloat16", max_num_seqs=MAX_SEQS, gpu_memory_utilization=0.2, compile=False)
    engine = Engine(tmp_path, config, max_model_len=64, topk=TOPK, support="student")
    assert engine.scores_by_id
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 4000, (n, 16), np.int32) for n in (20, 40)]
    rows = [
        Unscored(0, row, Rollout(f"p{row}/0", "", 0, ids[0][:, row], ids[1][:, row], np.zeros(40, np.float32)))
        for row in range(16)
    ]

    def graded(topk: int, support: Support, scores_by_id: bool) -> list[Rollout]:
        engine._topk, engine.scores_by_id = topk, scores_by_id
        return [row for _, row in sorted(score(engine, rows, topk=topk, support=support), key=lambda pair: pair[0].row)]

    in_prompt = graded(TOPK, "teacher", scores_by_id=False)
    rows = [
        replace(each, rollout=replace(each.rollout, rollout_topk_ids=top.topk_ids))
        for each, top in zip(rows, in_prompt, strict=True)
    ]
    by_id, given = graded(0, "teacher", scores_by_id=True), graded(TOPK, "student", scores_by_id=True)
    for one, other, column in (
        (by_id, in_prompt, "teacher_logprobs"),
        (by_id, given, "teacher_logprobs"),
        (given, in_prompt, "topk_logprobs"),
    ):
        difference = np.abs(_all([getattr(row, column) for row in one]) - _all([getattr(row, column) for row in other]))
        assert difference.mean() <= 0.02
        assert difference.max() <= 0.3
    engine._topk = 0
    noise = batch_noise(engine, rows[:4])
    assert noise is not None and noise <= 0.3
    engine.close()
