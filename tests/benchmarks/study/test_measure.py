"""What the study measures is what it says: exact distances, at answers that are the model's own."""

import math
from random import Random

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.study.setting.measure import answers, entropy, measure
from benchmarks.study.setting.networks import IDS, MAX_TOKENS, Size, decode, encode
from benchmarks.study.setting.task import END, Question, is_right, question


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return sharp(0)


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return [question(Random(number)) for number in range(150)]


def sharp(seed: int) -> LlamaForCausalLM:
    """A network that has learned nothing and is sure of it: a fresh one is nearly uniform, whatever it is asked."""
    torch.set_num_threads(1)
    built = Size(width=32, layers=1, heads=1).build(seed).eval()
    with torch.no_grad():
        built.lm_head.weight *= 12
    return built


@torch.no_grad()
def logps(model: LlamaForCausalLM, prompt: str, ids: list[int]) -> Tensor:
    """(tokens, vocabulary) before each token of an answer, by one plain forward pass."""
    start = encode(prompt)
    logits = model(torch.tensor([start + ids[:-1]])).logits[0, len(start) - 1 :]
    return logits.double().log_softmax(-1)


def test_a_model_is_at_no_distance_from_itself(model: LlamaForCausalLM, asked: list[Question]) -> None:
    found = measure(model, model, model, asked, seed=1)
    assert found.reverse_kl == pytest.approx(0, abs=1e-6)
    assert found.drift == pytest.approx(0, abs=1e-6)


def test_distances_are_the_sums_over_the_vocabulary_at_the_students_answers(
    model: LlamaForCausalLM, asked: list[Question]
) -> None:
    teacher, start = sharp(1), sharp(2)
    found = measure(model, teacher, start, asked, seed=1)
    sums, tokens, right = [0.0, 0.0], 0, 0
    for one, ids in answers(model, asked, seed=1):
        ours = logps(model, one.prompt, ids)
        for index, other in enumerate((teacher, start)):
            sums[index] += float((ours.exp() * (ours - logps(other, one.prompt, ids))).sum())
        tokens += len(ids)
        right += is_right(decode(ids), one.answer)
    assert found.reverse_kl > 0.5 and found.drift > 0.5
    assert (found.reverse_kl, found.drift) == pytest.approx((sums[0] / tokens, sums[1] / tokens), rel=1e-4)
    assert (found.tokens, found.accuracy) == (tokens / len(asked), right / len(asked))


def test_answers_follow_the_models_own_distribution(model: LlamaForCausalLM, asked: list[Question]) -> None:
    """Then -log p of what was drawn is the entropy where it was drawn, but for chance: four standard errors."""
    exact, excess, tokens = 0.0, list[float](), 0
    for one, ids in answers(model, asked, seed=3):
        at = logps(model, one.prompt, ids)
        own = float(-(at.exp() * at).sum())
        drawn = float(-at.gather(1, torch.tensor(ids)[:, None]).sum())
        exact, tokens = exact + own, tokens + len(ids)
        excess.append(drawn - own)
    error = math.sqrt(math.fsum(one * one for one in excess)) / tokens
    sampled = entropy(model, asked, seed=3)
    assert sampled == pytest.approx((exact + math.fsum(excess)) / tokens, abs=1e-5)
    assert abs(sampled - exact / tokens) < 4 * error
    assert 4 * error < 0.1 * sampled  # else the line above would say little


def test_an_answer_ends_with_its_first_end_or_is_cut_off(model: LlamaForCausalLM, asked: list[Question]) -> None:
    found = [ids for _, ids in answers(model, asked, seed=1)]
    assert len(found) == len(asked)
    for ids in found:
        assert IDS[END] not in ids[:-1]
        assert ids[-1] == IDS[END] or len(ids) == MAX_TOKENS
    assert any(ids[-1] == IDS[END] for ids in found)


def test_the_same_seed_gives_the_same_answers(model: LlamaForCausalLM, asked: list[Question]) -> None:
    one, same, other = (list(answers(model, asked, seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other
