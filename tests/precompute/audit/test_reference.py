"""The audit's own forward pass, and the distribution that vLLM samples from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from common.errors import DataError, UsageError
from precompute.audit.reference import Reference, behaviour
from precompute.config import Sampling
from tests.precompute import tiny
from tests.precompute.conftest import Models

POLICY = Sampling()


def brute_force(logits: np.ndarray, token: int, sampling: Sampling) -> float:
    """The log-prob of one token, by the definitions and in float64; -inf where it is cut off."""
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    weights = dict(enumerate(np.exp(logits - logits.max())))
    if sampling.temperature > 0:
        weights = {token: weight for token, weight in weights.items() if weight >= sampling.min_p}  # the best has 1
        ranked = sorted(weights, key=lambda token: -weights[token])
        ranked = ranked[: sampling.top_k or None]
        kept, mass, whole = [], 0.0, sum(weights[token] for token in ranked)
        for candidate in ranked:
            if mass < sampling.top_p:
                kept.append(candidate)
            mass += weights[candidate] / whole
        weights = {candidate: weights[candidate] for candidate in kept}
    return float(np.log(weights[token] / sum(weights.values()))) if token in weights else -np.inf


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0, "top_p": 0.5},
        {"temperature": 0.7},
        {"temperature": 1.6},
        {"top_k": 3},
        {"top_k": 5000},
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"min_p": 0.2},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.05},
    ],
    ids=str,
)
def test_sampled_logprobs_are_those_of_the_definition(settings: dict[str, float]) -> None:
    sampling, vocab = Sampling.model_validate(settings), 60
    logits = np.random.default_rng(0).normal(size=(40, vocab)) * 2.5
    tokens = np.argsort(-logits, axis=1)[np.arange(40), np.arange(40) // 2]  # likely and unlikely ones
    expected = np.array([brute_force(row, token, sampling) for row, token in zip(logits, tokens, strict=True)])
    found = behaviour(torch.tensor(logits, dtype=torch.float32), torch.tensor(tokens), sampling, noise=0.0)
    assert np.array_equal(found.outside.numpy(), np.isinf(expected))
    inside = np.isfinite(expected)
    assert inside.any()
    assert np.abs(found.logprobs.numpy() - expected)[inside].max() < 1e-5
    assert found.blur.abs().max() == 0


def test_temperature_comes_before_the_cuts() -> None:
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    warm = behaviour(logits, torch.tensor([2]), Sampling(temperature=2.0, top_p=0.7), noise=0.0)
    cold = behaviour(logits, torch.tensor([1]), Sampling(temperature=0.3, top_p=0.7), noise=0.0)
    assert (warm.outside.item(), cold.outside.item()) == (True, True)
    assert not behaviour(logits, torch.tensor([1]), Sampling(temperature=2.0, top_p=0.7), noise=0.0).outside.item()


def test_top_p_is_a_share_of_what_min_p_and_top_k_leave() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert not behaviour(logits, torch.tensor([1]), Sampling(top_p=0.5), noise=0.0).outside.item()
    assert behaviour(logits, torch.tensor([1]), Sampling(top_p=0.5, top_k=2), noise=0.0).outside.item()
    assert behaviour(logits, torch.tensor([1]), Sampling(top_p=0.5, min_p=0.6), noise=0.0).outside.item()


@pytest.mark.parametrize(
    ("sampling", "probs", "unsure"),
    [
        (Sampling(top_p=0.9), [0.899, 0.101], True),  # two engines may or may not let the second one in
        (Sampling(top_p=0.9), [0.8, 0.2], False),
        (Sampling(top_k=1), [0.501, 0.499], True),
        (Sampling(top_k=1), [0.6, 0.4], False),
        (Sampling(min_p=0.5), [0.667, 0.333], True),
        (Sampling(min_p=0.5), [0.5, 0.5], False),
        (Sampling(temperature=0.5), [0.501, 0.499], False),
    ],
)
def test_an_edge_within_the_noise_is_told_from_a_sure_one(sampling: Sampling, probs: list[float], unsure: bool) -> None:
    found = behaviour(torch.tensor([probs]).log(), torch.tensor([0]), sampling, noise=0.02)
    assert (found.blur.item() > 0.05) == unsure
    assert (found.blur.item() == 0) == (not unsure)


def test_a_token_within_the_noise_of_the_edge_is_not_called_cut_off() -> None:
    logits = torch.tensor([[0.5, 0.26, 0.24]]).log()
    assert behaviour(logits, torch.tensor([2]), Sampling(top_k=2), noise=0.01).outside.item()
    assert not behaviour(logits, torch.tensor([2]), Sampling(top_k=2), noise=0.1).outside.item()


def row(prompt: int, tokens: int, highest: int = tiny.VOCAB) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng([prompt, tokens]).integers(0, highest, prompt + tokens, np.int32)
    return ids[:prompt], ids[prompt:]


@torch.no_grad()
def whole_forward(folder: Path, prompt_ids: np.ndarray, completion_ids: np.ndarray) -> torch.Tensor:
    """Log-probs of the whole vocabulary before each completion token, in one piece."""
    network = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(np.concatenate([prompt_ids, completion_ids]).astype(np.int64))
    return network(ids[None], use_cache=False).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("chunk", [1, 4, 7, 1000])
@pytest.mark.parametrize("prompt", [1, 2, 9])
def test_pieces_of_a_row_give_what_one_pass_gives(models: Models, prompt: int, chunk: int) -> None:
    prompt_ids, completion_ids = row(prompt, 21)
    reference = Reference(models.teacher, dtype="float32", device="cpu")
    reference.chunk = chunk
    table = whole_forward(models.teacher, prompt_ids, completion_ids)
    best = table.topk(3)
    found = reference.score(prompt_ids, completion_ids, POLICY, topk_ids=best.indices.numpy().astype(np.int32))
    chosen = table.gather(-1, torch.tensor(completion_ids.astype(np.int64))[:, None])[:, 0]
    assert np.abs(found.logprobs - chosen.numpy()).max() < 1e-4
    assert np.abs(found.at_ids - best.values.numpy()).max() < 1e-4
    assert np.abs(found.kth - best.values[:, -1].numpy()).max() < 1e-4


def test_a_window_of_attention_holds_across_pieces(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=4, initializer_range=0.3,
    )  # fmt: skip
    network = MistralForCausalLM(config).eval()
    network.save_pretrained(tmp_path)
    prompt_ids, completion_ids = row(9, 21, highest=64)
    ids = torch.tensor(np.concatenate([prompt_ids, completion_ids]).astype(np.int64))
    with torch.no_grad():
        table = network(ids[None], use_cache=False).logits[0, 8:-1].log_softmax(-1)
    reference = Reference(tmp_path, dtype="float32", device="cpu")
    reference.chunk = 5
    found = reference.score(prompt_ids, completion_ids, POLICY)
    assert np.abs(found.logprobs - table.gather(-1, ids[9:, None])[:, 0].numpy()).max() < 1e-4


def test_the_logits_of_a_long_row_never_lie_in_memory_at_once(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference(models.teacher, dtype="float32", device="cpu")
    assert reference.chunk * tiny.VOCAB <= 2**24
    reference.chunk, widths = 4, []
    forward = reference._model.forward

    def watch(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        widths.append(output.logits.shape[1])
        return output

    monkeypatch.setattr(reference._model, "forward", watch)
    reference.score(*row(30, 21), POLICY)
    assert max(widths) == 4


def test_a_model_without_all_its_weights_is_refused(models: Models, tmp_path: Path) -> None:
    network = LlamaForCausalLM.from_pretrained(models.teacher)
    state = {name: weight for name, weight in network.state_dict().items() if "layers.1.mlp" not in name}
    network.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(DataError, match="lacks weights, first model.layers.1.mlp"):
        Reference(tmp_path, dtype="float32", device="cpu")


def test_a_device_that_is_not_there_is_named(models: Models) -> None:
    with pytest.raises(UsageError, match="no such device"):
        Reference(models.teacher, dtype="float32", device="abacus")
